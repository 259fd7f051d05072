//! Writes every kernel variant to a folder, in WGSL and in the languages that drivers accept, for the compilers that
//! `./portability` runs.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::{env, fs, io, thread};

use wgpu_attention::kernels::catalogue::{Kernel, Variant, variants};

#[path = "../tests/portability/translate.rs"]
mod translate;

fn kind(variant: &Variant) -> &'static str {
    if variant.uses_subgroups() { "subgroups" } else { "plain" }
}

fn path(folder: &Path, variant: &Variant, ending: &str) -> PathBuf {
    folder.join(format!("{}.{}.{ending}", variant.name.replace('/', "."), kind(variant)))
}

fn write_translations(folder: &Path, variant: &Variant) -> io::Result<()> {
    let source = variant.source().map_err(io::Error::other)?;
    fs::write(path(folder, variant, "wgsl"), &source)?;
    let (module, info) = translate::validate(&variant.name, &source);
    let texts = translate::translate(&module, &info, variant.uses_subgroups())
        .map_err(|error| io::Error::other(format!("{} {error}", variant.name)))?;
    // Metal's compiler runs only on Apple machines.
    for (ending, bytes) in texts.into_iter().filter(|(ending, _)| *ending != "metal") {
        fs::write(path(folder, variant, ending), bytes)?;
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [folder] = arguments.as_slice() else { return Err("usage: translate FOLDER".into()) };
    let folder = Path::new(folder);
    fs::create_dir_all(folder)?;
    for kernel in Kernel::ALL {
        fs::write(folder.join(format!("{}.file.wgsl", kernel.name())), kernel.source().map_err(io::Error::other)?)?;
    }
    let all: BTreeSet<Variant> = variants().into_iter().collect();
    let threads = thread::available_parallelism().map_or(1, |n| n.get());
    thread::scope(|scope| {
        let parts: Vec<_> = (0..threads)
            .map(|first| {
                let all = &all;
                scope.spawn(move || {
                    all.iter().skip(first).step_by(threads).try_for_each(|v| write_translations(folder, v))
                })
            })
            .collect();
        parts.into_iter().try_for_each(|part| part.join().expect("a panic has been reported"))
    })?;
    Ok(())
}

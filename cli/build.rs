//! The versions of wgpu and naga in Cargo.lock, which reports name.

use std::path::Path;

fn main() {
    let package = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets it");
    let package = Path::new(&package);
    // A published package has a lock file of its own; in the repository the workspace has it.
    let files = [package.join("Cargo.lock"), package.join("../Cargo.lock")];
    let file = files.iter().find(|file| file.exists());
    let lock = file.map(|file| std::fs::read_to_string(file).expect("Cargo.lock can be read")).unwrap_or_default();
    for name in ["wgpu", "naga"] {
        let version = locked(&lock, name).unwrap_or("unknown");
        println!("cargo::rustc-env=LOCKED_{}={version}", name.to_uppercase());
    }
    println!("cargo::rerun-if-changed=build.rs");
    if let Some(file) = file {
        println!("cargo::rerun-if-changed={}", file.display());
    }
}

fn locked<'a>(lock: &'a str, package: &str) -> Option<&'a str> {
    let name = format!("name = \"{package}\"");
    let version = lock.lines().skip_while(|line| *line != name).nth(1)?;
    version.strip_prefix("version = \"")?.strip_suffix('"')
}

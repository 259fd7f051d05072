//! What users of the packages have to build.

use std::path::Path;
use std::process::Command;

/// Crates of build scripts that call a C compiler, or look for a C library.
const CALLERS: [&str; 7] = ["bindgen", "cc", "cmake", "nasm-rs", "pkg-config", "system-deps", "vcpkg"];

/// `cargo tree` of what a package needs on Linux without its tests, each line behind its depth.
fn tree(package: &str) -> String {
    let output = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()))
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")))
        .args(["tree", "--locked", "--package", package, "--all-features", "--edges", "normal,build"])
        .args(["--target", "x86_64-unknown-linux-gnu", "--prefix", "depth", "--format", " {p}"])
        .output()
        .expect("cargo starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// Ways from the package to a crate of [`CALLERS`].
fn ways(tree: &str) -> Vec<String> {
    let (mut way, mut found) = (Vec::new(), Vec::new());
    for line in tree.lines() {
        let mut words = line.split(' ');
        let Some(depth) = words.next().and_then(|depth| depth.parse().ok()) else { continue };
        let name = words.next().expect("a name behind the depth");
        way.truncate(depth);
        way.push(name);
        // wgpu loads Wayland when it runs. The build script of wayland-sys then asks pkg-config nothing.
        if CALLERS.contains(&name) && !way.ends_with(&["wgpu-hal", "wayland-sys", "pkg-config"]) {
            found.push(way.join(" needs "));
        }
    }
    found
}

#[test]
fn no_package_needs_a_c_compiler_or_library() {
    for package in ["wgpu-attention", "wgpu-attention-conformance", "wgpu-attention-cli"] {
        let tree = tree(package);
        assert!(tree.lines().count() > 50, "{tree}");
        assert_eq!(ways(&tree), [""; 0]);
    }
}

#[test]
fn a_c_compiler_is_found() {
    let tree = "0 a v1\n1 b v1\n2 wgpu-hal v1\n3 wayland-sys v1\n4 pkg-config v1\n1 c v1 (*)\n2 cc v1\n";
    assert_eq!(ways(tree), ["a needs c needs cc"]);
}

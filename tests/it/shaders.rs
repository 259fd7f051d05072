//! Every shader file and every legal variant, held against compilers without a GPU.

use std::collections::{BTreeMap, BTreeSet};

use translate::{translate, validate};
use wgpu_attention::kernels::catalogue::{self, Kernel};
use wgpu_attention::kernels::params;

#[path = "../portability/translate.rs"]
mod translate;

#[test]
fn every_file_is_valid_as_it_stands() {
    for kernel in Kernel::ALL {
        validate(kernel.name(), &kernel.source().unwrap());
    }
}

/// The bindings of a module, by number: name and whether it is only read.
fn bindings(module: &naga::Module) -> BTreeMap<u32, naga::AddressSpace> {
    module.global_variables.iter().filter_map(|(_, v)| Some((v.binding.as_ref()?.binding, v.space))).collect()
}

#[test]
fn every_variant_is_valid_and_what_planning_counts() {
    let variants = catalogue::variants();
    assert!(variants.len() > 100, "{} variants", variants.len());
    let (mut translated, mut loaded) = (BTreeSet::new(), BTreeSet::new());
    for variant in &variants {
        let name = &variant.name;
        let source = variant.source().unwrap();
        let (module, info) = validate(name, &source);
        let storage =
            bindings(&module).values().filter(|space| matches!(space, naga::AddressSpace::Storage { .. })).count();
        assert!(storage <= 7, "{name}: {storage} storage buffers; Metal needs one of 8");

        let entry = &module.entry_points[0];
        let width = entry.workgroup_size[0];
        assert!(width <= 256 && entry.workgroup_size[1..] == [1, 1], "{name}: {:?}", entry.workgroup_size);
        let mut layouter = naga::proc::Layouter::default();
        layouter.update(module.to_ctx()).unwrap();
        let shared: u32 = (module.global_variables.iter())
            .filter(|(_, v)| v.space == naga::AddressSpace::WorkGroup)
            .map(|(_, v)| layouter[v.ty].size)
            .sum();
        assert_eq!(shared, variant.workgroup_memory(), "{name}");
        assert!(shared <= 16 << 10, "{name}: {shared} bytes of workgroup memory");

        // One of each kernel here, with subgroups and without; `./portability` translates all.
        if translated.insert((variant.kernel.name(), variant.uses_subgroups())) {
            let texts =
                translate(&module, &info, variant.uses_subgroups()).unwrap_or_else(|error| panic!("{name} {error}"));
            assert_eq!(texts.len(), if variant.uses_subgroups() { 4 } else { 8 });
        }
        let by_64_bits = variant.loading_64_bits();
        if by_64_bits.changes != variant.changes
            && loaded.insert((variant.kernel.name(), by_64_bits.changes.aliases.clone()))
        {
            validate(name, &by_64_bits.source().unwrap());
        }
    }
    assert!(loaded.len() >= 40, "{} kinds of loads by 64 bits", loaded.len());
}

#[test]
fn params_have_the_layout_that_the_shaders_read() {
    for kernel in Kernel::ALL {
        let (module, _) = validate(kernel.name(), &kernel.source().unwrap());
        let mut layouter = naga::proc::Layouter::default();
        layouter.update(module.to_ctx()).unwrap();
        let (handle, _) = module.types.iter().find(|(_, ty)| ty.name.as_deref() == Some("Params")).unwrap();
        let mut reflected = Vec::new();
        list(&module, &layouter, handle, "", 0, &mut reflected);
        assert_eq!(kernel.params(), reflected, "{}.wgsl", kernel.name());
    }
}

/// The numbers of a type, members of nested structs behind a dot.
fn list(
    module: &naga::Module,
    layouter: &naga::proc::Layouter,
    ty: naga::Handle<naga::Type>,
    name: &str,
    offset: usize,
    to: &mut params::Fields,
) {
    let naga::TypeInner::Struct { members, .. } = &module.types[ty].inner else {
        to.push((name.to_string(), offset, layouter[ty].size as usize));
        return;
    };
    for member in members {
        let own = member.name.as_deref().unwrap();
        let path = if name.is_empty() { own.to_string() } else { format!("{name}.{own}") };
        list(module, layouter, member.ty, &path, offset + member.offset as usize, to);
    }
}

#[test]
fn variant_names_tell_variants_apart() {
    let mut by_name = BTreeMap::new();
    for variant in catalogue::variants() {
        let source = variant.source().unwrap();
        assert_eq!(*by_name.entry(variant.name.clone()).or_insert_with(|| source.clone()), source, "{}", variant.name);
        assert_eq!(wgpu_attention::kernels::variant_source(&variant.name).unwrap(), source);
    }
    assert!(wgpu_attention::kernels::variant_source("scores.wgsl").unwrap().contains("@compute"));
    let message = wgpu_attention::kernels::variant_source("nobody").unwrap_err().to_string();
    assert!(message.contains("nobody"), "{message}");
}

/// WGSL sets such a variable to zero each time round; Tint's SPIR-V, and naga's before wgpu 30, do so once.
#[test]
fn variables_of_loops_have_initial_values() {
    let mut checked = 0;
    for variant in catalogue::variants() {
        let source = variant.source().unwrap();
        // The keyword of each open brace.
        let mut open = Vec::new();
        for line in source.lines().map(str::trim) {
            let declares = line.strip_prefix("var ").is_some_and(|rest| rest.ends_with(';') && !rest.contains('='));
            checked += usize::from(declares);
            assert!(!(declares && open.contains(&true)), "{}: {line}", variant.name);
            let loops = ["for ", "while ", "loop "].iter().any(|word| line.starts_with(word));
            for brace in line.chars().filter(|c| "{}".contains(*c)) {
                if brace == '{' {
                    open.push(loops);
                } else {
                    open.pop();
                }
            }
        }
    }
    assert!(checked > 1000, "{checked}");
}

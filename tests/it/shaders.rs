//! Every shader file and every legal variant, checked with compilers that need no GPU.

use std::collections::{BTreeMap, BTreeSet};

use translate::{translate, validate};
use wgpu_attention::kernels::catalogue::{self, Kernel};
use wgpu_attention::kernels::params;

#[path = "../portability/translate.rs"]
mod translate;

#[test]
fn every_unspecialised_file_is_valid() {
    for kernel in Kernel::ALL {
        validate(kernel.name(), &kernel.source().unwrap());
    }
}

#[test]
fn every_variant_is_valid_and_matches_its_plan() {
    let variants = catalogue::variants();
    assert!(variants.len() > 100, "{} variants", variants.len());
    let (mut translated, mut loaded) = (BTreeSet::new(), BTreeSet::new());
    for variant in &variants {
        let name = &variant.name;
        let source = variant.source().unwrap();
        let (module, info) = validate(name, &source);
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

        // Translate one variant of each kernel with and without subgroups; `./portability` translates all.
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

/// The scalar members of a type; names of nested members contain a dot.
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
fn variant_names_are_unique() {
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

/// WGSL sets an uninitialised loop variable to zero in each iteration; Tint's SPIR-V, and naga's before wgpu 30, only
/// once.
#[test]
fn variables_of_loops_have_initial_values() {
    let mut checked = 0;
    for variant in catalogue::variants() {
        let source = variant.source().unwrap();
        // The keyword before each open brace.
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

/// An upper bound on what a value depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Made {
    Constants,
    Parameters,
    More,
}

/// What is known about a function so far.
#[derive(Clone, PartialEq, Eq)]
struct Known {
    locals: Vec<Made>,
    /// Variables that loops change.
    counting: Vec<usize>,
    calls: BTreeMap<usize, Made>,
    returned: Made,
}

/// Determines what the conditions of branches and loops depend on, through calls.
struct Conditions<'a> {
    module: &'a naga::Module,
    /// Functions with a condition that depends only on parameters.
    found: BTreeSet<String>,
}

impl Conditions<'_> {
    fn function(&mut self, function: &naga::Function, arguments: &[Made]) -> Made {
        let mut known = Known {
            locals: vec![Made::Constants; function.local_variables.len()],
            counting: Vec::new(),
            calls: BTreeMap::new(),
            returned: Made::Constants,
        };
        let found = self.found.clone();
        // Iterate until no variable's dependencies grow; only then record findings.
        loop {
            self.found.clone_from(&found);
            let before = known.clone();
            let values = self.values(function, arguments, &known.locals, &known.calls);
            // A variable that changes between iterations matters only for bounds, not for branches.
            let mut changing = known.locals.clone();
            known.counting.iter().for_each(|&n: &usize| changing[n] = Made::More);
            let branches = self.values(function, arguments, &changing, &known.calls);
            self.block(&function.body, function, [&values, &branches], &mut known, false);
            if before == known {
                return known.returned;
            }
        }
    }

    fn values(
        &self,
        function: &naga::Function,
        arguments: &[Made],
        locals: &[Made],
        calls: &BTreeMap<usize, Made>,
    ) -> Vec<Made> {
        use naga::Expression as E;
        let mut values: Vec<Made> = Vec::new();
        for (handle, expression) in function.expressions.iter() {
            let of = |handle: naga::Handle<naga::Expression>| values[handle.index()];
            let made = match *expression {
                E::Literal(_) | E::Constant(_) | E::ZeroValue(_) | E::Override(_) => Made::Constants,
                E::FunctionArgument(n) => arguments[n as usize],
                E::GlobalVariable(variable) => match self.module.global_variables[variable].space {
                    naga::AddressSpace::Uniform => Made::Parameters,
                    _ => Made::More,
                },
                E::LocalVariable(variable) => locals[variable.index()],
                E::Load { pointer } => of(pointer),
                E::Access { base, index } => of(base).max(of(index)),
                E::AccessIndex { base, .. } => of(base),
                E::Splat { value, .. } => of(value),
                E::Swizzle { vector, .. } => of(vector),
                E::Compose { ref components, .. } => {
                    components.iter().map(|&one| of(one)).max().unwrap_or(Made::Constants)
                }
                E::Unary { expr, .. } | E::As { expr, .. } => of(expr),
                E::Binary { left, right, .. } => of(left).max(of(right)),
                E::Select { condition, accept, reject } => of(condition).max(of(accept)).max(of(reject)),
                E::Relational { argument, .. } => of(argument),
                E::Math { arg, arg1, arg2, arg3, .. } => {
                    [arg1, arg2, arg3].into_iter().flatten().map(of).fold(of(arg), Ord::max)
                }
                E::CallResult(_) => calls.get(&handle.index()).copied().unwrap_or(Made::Constants),
                _ => Made::More,
            };
            values.push(made);
        }
        values
    }

    fn block(
        &mut self,
        block: &naga::Block,
        function: &naga::Function,
        [values, branches]: [&[Made]; 2],
        known: &mut Known,
        in_loop: bool,
    ) {
        use naga::{Expression as E, Statement as S};
        for statement in block.iter() {
            match statement {
                S::Block(inner) => self.block(inner, function, [values, branches], known, in_loop),
                S::If { condition, accept, reject } => {
                    let ends_loop = |block: &naga::Block| matches!(block.iter().as_slice(), [S::Break]);
                    let of = if ends_loop(accept) || ends_loop(reject) { values } else { branches };
                    if of[condition.index()] == Made::Parameters {
                        self.found.insert(function.name.clone().unwrap_or_else(|| "main".into()));
                    }
                    self.block(accept, function, [values, branches], known, in_loop);
                    self.block(reject, function, [values, branches], known, in_loop);
                }
                S::Loop { body, continuing, .. } => {
                    self.block(body, function, [values, branches], known, true);
                    self.block(continuing, function, [values, branches], known, true);
                }
                S::Store { pointer, value } => {
                    let mut root = *pointer;
                    let variable = loop {
                        match function.expressions[root] {
                            E::Access { base, .. } | E::AccessIndex { base, .. } => root = base,
                            E::LocalVariable(variable) => break Some(variable),
                            _ => break None,
                        }
                    };
                    if let Some(variable) = variable {
                        let made = &mut known.locals[variable.index()];
                        *made = (*made).max(values[value.index()]);
                        if in_loop && !known.counting.contains(&variable.index()) {
                            known.counting.push(variable.index());
                        }
                    }
                }
                S::Call { function: called, arguments, result } => {
                    let arguments: Vec<Made> = arguments.iter().map(|one| branches[one.index()]).collect();
                    let made = self.function(&self.module.functions[*called], &arguments);
                    if let Some(result) = result {
                        known.calls.insert(result.index(), made);
                    }
                }
                S::Return { value: Some(value) } => known.returned = known.returned.max(values[value.index()]),
                _ => {}
            }
        }
    }
}

fn conditions_of_parameters(source: &str) -> BTreeSet<String> {
    let module =
        naga::front::wgsl::parse_str(source).unwrap_or_else(|error| panic!("{}", error.emit_to_string(source)));
    let mut conditions = Conditions { module: &module, found: BTreeSet::new() };
    let main = &module.entry_points[0].function;
    conditions.function(main, &vec![Made::More; main.arguments.len()]);
    conditions.found
}

/// lavapipe recompiles a kernel for every dispatch if a branch or a loop bound depends only on parameters.
#[test]
fn no_branch_or_bound_depends_only_on_parameters() {
    for variant in catalogue::variants() {
        // This kernel only measures, with the same number of iterations in all calls.
        if variant.kernel == Kernel::Probe {
            continue;
        }
        let found = conditions_of_parameters(&variant.source().unwrap());
        assert!(found.is_empty(), "{}: in {found:?}", variant.name);
    }
    // Through a call, a loop that begins at 0, and a branch.
    let text = |run: &str| {
        format!(
            "struct Params {{ a: u32, b: u32 }}
            @group(0) @binding(0) var<uniform> params: Params;
            @group(0) @binding(1) var<storage, read_write> y: array<u32>;
            fn most(a: u32) -> u32 {{ return max(a, params.b) + 1u; }}
            @compute @workgroup_size(1) fn main(@builtin(workgroup_id) id: vec3<u32>) {{ {run} }}"
        )
    };
    for (run, is_found) in [
        ("for (var j = 0u; j < most(3u); j += 4u) { y[j] = id.x; }", true),
        ("var end = params.a; if (id.x > 3u) { end = params.b; } for (var j = 0u; j < end; j++) { y[j] = 1u; }", true),
        ("if (params.a > params.b) { y[id.x] = 1u; }", true),
        ("for (var j = 0u; j < most(id.x); j += 4u) { y[j] = id.x; }", false),
        ("for (var j = id.x; j < params.a; j += 4u) { y[j] = id.x; }", false),
        ("for (var j = 0u; j < 7u; j++) { y[j] = params.a; }", false),
        ("for (var j = 0u; j < 7u; j++) { if (j < params.a) { y[j] = 1u; } }", false),
    ] {
        assert_eq!(!conditions_of_parameters(&text(run)).is_empty(), is_found, "{run}");
    }
}

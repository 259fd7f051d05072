//! Translates variants as wgpu does for drivers, with the options of wgpu-hal's backends.

use naga::back::{glsl, hlsl, msl, spv};
use naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy};
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};

pub fn validate(name: &str, source: &str) -> (naga::Module, ModuleInfo) {
    let module =
        naga::front::wgsl::parse_str(source).unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string(source)));
    // 64-bit loads are only for devices that support them: the translated texts have none.
    let capabilities = Capabilities::SUBGROUP | Capabilities::SHADER_FLOAT16_IN_FLOAT32 | Capabilities::SHADER_INT64;
    let info = Validator::new(ValidationFlags::all(), capabilities)
        .validate(&module)
        .unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string(source)));
    (module, info)
}

const RESTRICT: BoundsCheckPolicies = BoundsCheckPolicies {
    index: BoundsCheckPolicy::Restrict,
    buffer: BoundsCheckPolicy::Restrict,
    image_load: BoundsCheckPolicy::Restrict,
    binding_array: BoundsCheckPolicy::Unchecked,
};

fn to_spirv(module: &naga::Module, info: &ModuleInfo, lang_version: (u8, u8)) -> Result<Vec<u8>, String> {
    let options = spv::Options {
        lang_version,
        bounds_check_policies: RESTRICT,
        zero_initialize_workgroup_memory: spv::ZeroInitializeWorkgroupMemoryMode::None,
        ..Default::default()
    };
    let words = spv::write_vec(module, info, &options, None).map_err(|error| error.to_string())?;
    Ok(words.iter().flat_map(|word| word.to_le_bytes()).collect())
}

fn to_msl(module: &naga::Module, info: &ModuleInfo) -> Result<Vec<u8>, String> {
    let options = msl::Options {
        lang_version: (2, 4),
        bounds_check_policies: RESTRICT,
        zero_initialize_workgroup_memory: false,
        ..Default::default()
    };
    let written = msl::write_string(module, info, &options, &msl::PipelineOptions::default());
    Ok(written.map_err(|error| error.to_string())?.0.into_bytes())
}

fn to_hlsl(module: &naga::Module, info: &ModuleInfo, shader_model: hlsl::ShaderModel) -> Result<Vec<u8>, String> {
    let options = hlsl::Options { shader_model, zero_initialize_workgroup_memory: false, ..Default::default() };
    let mut text = String::new();
    hlsl::Writer::new(&mut text, &options, &hlsl::PipelineOptions::default())
        .write(module, info, None)
        .map_err(|error| error.to_string())?;
    Ok(text.into_bytes())
}

fn to_glsl(module: &naga::Module, info: &ModuleInfo, version: glsl::Version) -> Result<Vec<u8>, String> {
    // Storage buffers are numbered in the order of their bindings, separately from the uniform buffer.
    let mut storage: Vec<_> = (module.global_variables.iter())
        .filter(|(_, global)| matches!(global.space, naga::AddressSpace::Storage { .. }))
        .filter_map(|(_, global)| global.binding)
        .collect();
    storage.sort_by_key(|at| at.binding);
    let mut binding_map: glsl::BindingMap = storage.into_iter().zip(0..).collect();
    binding_map.insert(naga::ResourceBinding { group: 0, binding: 0 }, 0);
    let options = glsl::Options { version, binding_map, zero_initialize_workgroup_memory: false, ..Default::default() };
    let pipeline =
        glsl::PipelineOptions { shader_stage: naga::ShaderStage::Compute, entry_point: "main".into(), multiview: None };
    let mut text = String::new();
    glsl::Writer::new(&mut text, module, info, &options, &pipeline, BoundsCheckPolicies::default())
        .and_then(|mut writer| writer.write())
        .map_err(|error| error.to_string())?;
    Ok(text.into_bytes())
}

/// The text or code of a module in every supported language, with the file extension.
pub fn translate(
    module: &naga::Module,
    info: &ModuleInfo,
    uses_subgroups: bool,
) -> Result<Vec<(&'static str, Vec<u8>)>, String> {
    let named = |language: &'static str, result: Result<Vec<u8>, String>| match result {
        Ok(bytes) => Ok((language, bytes)),
        Err(error) => Err(format!("does not translate to {language}: {error}")),
    };
    let mut all = vec![
        named("1_1.spv", to_spirv(module, info, (1, 3)))?,
        named("1_3.spv", to_spirv(module, info, (1, 6)))?,
        named("metal", to_msl(module, info))?,
        named("6_2.hlsl", to_hlsl(module, info, hlsl::ShaderModel::V6_2))?,
    ];
    // Vulkan 1.0 and FXC have no subgroups. GLSL has them only as an extension of desktop versions, and wgpu does not
    // support them over GL.
    if !uses_subgroups {
        let embedded = glsl::Version::Embedded { version: 310, is_webgl: false };
        all.extend([
            named("1_0.spv", to_spirv(module, info, (1, 0)))?,
            named("5_1.hlsl", to_hlsl(module, info, hlsl::ShaderModel::V5_1))?,
            named("430.comp", to_glsl(module, info, glsl::Version::Desktop(430)))?,
            named("310es.comp", to_glsl(module, info, embedded))?,
        ]);
    }
    Ok(all)
}

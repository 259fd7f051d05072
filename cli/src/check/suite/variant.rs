//! Methods for attention, as written in ids and options.

use wgpu_attention::Method;

/// Formats a method as in an id.
pub fn variant(method: Method) -> String {
    match method {
        Method::ThreePasses => "three-passes".into(),
        other => other.to_string(),
    }
}

/// Parses a method as in an id.
pub fn parse_variant(text: &str) -> Result<String, String> {
    text.parse().map(variant).map_err(|error: wgpu_attention::Error| error.to_string())
}

/// Parses a method, or `all`.
pub fn parse_method(text: &str) -> Result<String, String> {
    if text == "all" { Ok(text.into()) } else { parse_variant(text) }
}

/// The case name and the method of an id; `auto` if the id has none.
pub fn parse_id(id: &str) -> Result<(&str, Method), String> {
    // A file name may contain any character.
    let (name, method) = id.rsplit_once('@').unwrap_or((id, "auto"));
    let method = method.parse().map_err(|error: wgpu_attention::Error| format!("{id}: {error}"))?;
    Ok((name, method))
}

//! Ways to compute attention, as ids and options write them.

use wgpu_attention::Method;

/// A method as an id writes it.
pub fn variant(method: Method) -> String {
    match method {
        Method::ThreePasses => "three-passes".into(),
        other => other.to_string(),
    }
}

/// A method, as an id writes it.
pub fn parse_variant(text: &str) -> Result<String, String> {
    text.parse().map(variant).map_err(|error: wgpu_attention::Error| error.to_string())
}

/// A method, or `all` of them.
pub fn parse_method(text: &str) -> Result<String, String> {
    if text == "all" { Ok(text.into()) } else { parse_variant(text) }
}

/// A case's name and its method out of an id; `auto` where it names none.
pub fn parse_id(id: &str) -> Result<(&str, Method), String> {
    // The name of a file may hold any character.
    let (name, method) = id.rsplit_once('@').unwrap_or((id, "auto"));
    let method = method.parse().map_err(|error: wgpu_attention::Error| format!("{id}: {error}"))?;
    Ok((name, method))
}

//! The machine's memory, which limits software adapters and the CPU backend.

/// Bytes of memory, if known.
#[cfg(not(target_arch = "wasm32"))]
pub(crate) fn system_memory() -> Option<u64> {
    let kind = sysinfo::RefreshKind::nothing().with_memory(sysinfo::MemoryRefreshKind::nothing().with_ram());
    Some(sysinfo::System::new_with_specifics(kind).ok()?.total_memory()).filter(|&bytes| bytes > 0)
}

#[cfg(target_arch = "wasm32")]
pub(crate) fn system_memory() -> Option<u64> {
    None
}

/// An error if this machine cannot hold `elements` floats; checked before allocating.
pub(crate) fn check_floats(what: &str, elements: &[usize]) -> crate::Result<()> {
    /// For smaller sizes the check costs more than it is worth: it reads a file.
    const SMALL: u64 = 64 << 20;
    let needed = crate::problem::checked_len(elements)? as u64 * 4;
    if needed <= SMALL {
        return Ok(());
    }
    match system_memory() {
        Some(limit) if needed > limit => Err(crate::Error::TooLarge {
            what: what.into(),
            needed,
            limit_name: "the memory",
            limit,
            adapter: "cpu".into(),
            way_out: "",
        }),
        _ => Ok(()),
    }
}

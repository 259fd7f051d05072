//! How much memory this machine has: what a software adapter and the CPU backend can use.

/// Bytes of memory, where that can be found out.
#[cfg(not(target_arch = "wasm32"))]
pub(crate) fn system_memory() -> Option<u64> {
    let kind = sysinfo::RefreshKind::nothing().with_memory(sysinfo::MemoryRefreshKind::nothing().with_ram());
    Some(sysinfo::System::new_with_specifics(kind).ok()?.total_memory()).filter(|&bytes| bytes > 0)
}

#[cfg(target_arch = "wasm32")]
pub(crate) fn system_memory() -> Option<u64> {
    None
}

/// Refuses, before anything is allocated, `elements` floats that this machine cannot hold.
pub(crate) fn check_floats(what: &str, elements: &[usize]) -> crate::Result<()> {
    /// Below this, the question costs more than the answer is worth.
    const SMALL: u64 = 64 << 20;
    let needed = crate::problem::checked_len(elements)? as u64 * 4;
    match system_memory().filter(|_| needed > SMALL) {
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

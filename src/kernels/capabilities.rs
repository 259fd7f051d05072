//! The adapter properties that planning uses.

use super::gpu_kind::GpuKind;
use super::method::Tile;

/// The kind of hardware behind an adapter. It decides the tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AdapterClass {
    /// A software adapter: lanes are SIMD lanes, registers are cheap, loads and barriers are expensive.
    Cpu,
    /// A GPU, integrated or discrete.
    Gpu,
}

/// The adapter properties that planning uses. Tests make them up.
#[derive(Clone, Debug, PartialEq)]
pub struct Capabilities {
    /// For messages.
    pub adapter: String,
    /// Kind of hardware.
    pub class: AdapterClass,
    /// Whose GPU it is.
    pub kind: GpuKind,
    /// Smallest subgroup size that the adapter may use, if its subgroup operations are usable.
    pub subgroup_min: Option<u32>,
    /// Maximum bytes of one storage binding.
    pub max_binding: u64,
    /// Maximum bytes of one buffer.
    pub max_buffer: u64,
    /// Maximum storage buffers per kernel.
    pub max_storage_buffers: u32,
    /// Maximum workgroups per dispatch dimension.
    pub max_workgroups: u32,
    /// Maximum invocations per workgroup.
    pub max_invocations: u32,
    /// Bytes of workgroup memory. wgpu does not check it; [`Step`](super::Step)s are checked against it.
    pub workgroup_memory: u32,
    /// Alignment of a storage binding's offset, in bytes.
    pub offset_alignment: u64,
    /// Total bytes of memory that the adapter may use, if known.
    pub memory: Option<u64>,
    /// Maximum number of iterations of all loops of an invocation together, if the driver silently stops loops there
    /// ([`MESA_LOOP_TURNS`](super::turns::MESA_LOOP_TURNS)). `None`: unlimited.
    pub max_loop_turns: Option<u32>,
    /// Tiles of the fused kernel that the driver did not compile, or not in reasonable time.
    pub refused_tiles: Vec<Tile>,
    /// Whether the same is true of `project_tiled.wgsl`.
    pub refuses_tiled_products: bool,
    /// Maximum floating-point operations of one dispatch, which cannot be interrupted. `None`: decided by the class.
    pub max_operations: Option<f64>,
}

impl Capabilities {
    /// WebGPU's guaranteed minimum, which every variant without subgroups must fit.
    pub fn webgpu_minimum() -> Capabilities {
        Capabilities {
            adapter: "WebGPU minimum".into(),
            class: AdapterClass::Gpu,
            kind: GpuKind::Other,
            subgroup_min: None,
            max_binding: 128 << 20,
            max_buffer: 256 << 20,
            max_storage_buffers: 8,
            max_workgroups: 65_535,
            max_invocations: 256,
            workgroup_memory: 16 << 10,
            offset_alignment: 256,
            memory: None,
            max_loop_turns: None,
            refused_tiles: Vec::new(),
            refuses_tiled_products: false,
            max_operations: None,
        }
    }

    /// Maximum floating-point operations of one dispatch.
    pub(crate) fn dispatch_operations(&self) -> f64 {
        self.max_operations.unwrap_or(match self.class {
            // Half a second at 40 GFLOP/s.
            AdapterClass::Cpu => 20e9,
            AdapterClass::Gpu => 1e12,
        })
    }

    /// Maximum iterations of an invocation's loops.
    pub(crate) fn loop_turns(&self) -> u64 {
        self.max_loop_turns.map_or(u64::MAX, u64::from)
    }
}

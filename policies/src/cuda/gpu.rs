//! A card: memory, kernels by name, launches.

#![expect(unsafe_code, reason = "launches and uninitialised memory are unsafe by their nature; all of them are here")]

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::cublas::{CudaBlas, result::gemm_ex, sys as blas};
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaGraph, CudaSlice, CudaStream, DevicePtr, DeviceRepr, LaunchConfig, result, sys,
};
use candle_core::cuda_backend::{CudaDevice, DeviceId};
use candle_core::{DType, Device, Error, Result, Shape, Storage, Tensor, bail};

use super::arguments::Argument;
use super::products::Product;
use crate::decoder::Compute;

/// All kernels, compiled by build.rs.
const KERNELS: &str = include_str!(concat!(env!("OUT_DIR"), "/kernels.ptx"));
/// The handle that stands for the stream of whatever thread calls: CU_STREAM_PER_THREAD.
const PER_THREAD: usize = 2;
/// What cuBLAS may use beside its operands; NVIDIA's advice for Hopper, and no product asks for memory while captured.
const WORKSPACE_BYTES: usize = 32 << 20;

/// The type that activations and the weights of products have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    F32,
    Bf16,
}

impl Kind {
    pub(super) fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }

    fn suffix(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }

    fn of_blas(self) -> blas::cudaDataType {
        match self {
            Self::F32 => blas::cudaDataType::CUDA_R_32F,
            Self::Bf16 => blas::cudaDataType::CUDA_R_16BF,
        }
    }
}

impl From<Compute> for Kind {
    fn from(compute: Compute) -> Self {
        match compute {
            Compute::F32 => Self::F32,
            Compute::Bf16 => Self::Bf16,
        }
    }
}

/// Memory of a card, freed in the order of its stream.
#[derive(Debug)]
pub(super) struct Buffer {
    memory: CudaSlice<u8>,
    at: u64,
}

impl Buffer {
    /// Where its byte number `bytes` lies.
    pub(super) fn at(&self, bytes: usize) -> u64 {
        self.at + bytes as u64
    }

    pub(super) fn bytes(&self) -> usize {
        self.memory.len()
    }
}

/// Blocks and threads of a launch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extent {
    pub(super) grid: (usize, usize, usize),
    pub(super) threads: usize,
    pub(super) shared_bytes: usize,
}

impl Extent {
    pub(super) fn new(grid: (usize, usize, usize), threads: usize) -> Self {
        Self { grid, threads, shared_bytes: 0 }
    }

    /// A thread for each of `n`, 256 in a block.
    pub(super) fn over(n: usize) -> Self {
        Self::new((n.div_ceil(256), 1, 1), 256)
    }
}

/// A card with its kernels.
#[derive(Debug)]
pub(super) struct Gpu {
    device: CudaDevice,
    stream: Arc<CudaStream>,
    functions: Mutex<BTreeMap<String, Arc<CudaFunction>>>,
    blas: CudaBlas,
    /// What `blas` may use, as long as it is there.
    _workspace: Buffer,
}

/// One for each device, for as long as the program runs: loading modules and making a handle of cuBLAS takes longer than
/// many a pass.
static CARDS: Mutex<Vec<(DeviceId, Arc<Gpu>)>> = Mutex::new(Vec::new());

fn wrapped(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    let text = error.to_string();
    match text.contains("OUT_OF_MEMORY") {
        true => Error::Msg(format!(
            "the card has no memory left ({text}); lower rollout.rows_per_call and rows_per_backward, or keep one layer's \
             activations at a time (--recompute-layers)"
        )),
        false => Error::wrap(error),
    }
}

/// What is wrong where kernels do not load because none were compiled.
fn without_compiler(error: Error) -> Error {
    match KERNELS.contains(".version") {
        true => error,
        false => error.context("no kernels were compiled into this build: policies/cuda/toolchain.sh DIR --compiler"),
    }
}

impl Gpu {
    fn new(device: &CudaDevice) -> Result<Self> {
        if device.cuda_stream().cu_stream() as usize == PER_THREAD {
            bail!("this device has a stream for each thread; make it by grpo_policies::cuda::device");
        }
        // SAFETY: everything here is on one stream, whose order is the only synchronisation that is needed.
        unsafe { device.disable_event_tracking() };
        let stream = device.cuda_stream();
        // A handle of its own: candle's would go on with our workspace.
        let (blas, workspace) = (CudaBlas::new(stream.clone()).map_err(wrapped)?, allocate(&stream, WORKSPACE_BYTES)?);
        // SAFETY: the workspace lives as long as the handle.
        unsafe { blas::cublasSetWorkspace_v2(*blas.handle(), workspace.at as *mut c_void, workspace.bytes()) }
            .result()
            .map_err(wrapped)?;
        // Sums in f32 throughout, also where a product is split and its parts are added.
        let exact = blas::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
        // SAFETY: as above.
        unsafe { blas::cublasSetMathMode(*blas.handle(), exact) }.result().map_err(wrapped)?;
        Ok(Self { device: device.clone(), stream, functions: Mutex::default(), blas, _workspace: workspace })
    }

    /// The card of a device.
    pub(super) fn on(device: &Device) -> Result<Arc<Self>> {
        let device = device.as_cuda_device()?;
        let mut cards = CARDS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, card)) = cards.iter().find(|(id, _)| *id == device.id()) {
            return Ok(card.clone());
        }
        let card = Arc::new(Self::new(device)?);
        cards.push((device.id(), card.clone()));
        Ok(card)
    }

    /// The card that a tensor lies on.
    pub(super) fn of(tensor: &Tensor) -> Result<Arc<Self>> {
        Self::on(tensor.device())
    }

    pub(super) fn device(&self) -> Device {
        Device::Cuda(self.device.clone())
    }

    /// Lets the driver keep what is freed, rather than give it back whenever the host waits.
    pub(super) fn keep_freed_memory(&self) -> Result<()> {
        let mut most = u64::MAX;
        let which = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: the attribute is a u64.
        unsafe { result::mem_pool::set_attribute(self.pool()?, which, (&raw mut most).cast()) }.map_err(wrapped)
    }

    /// The driver's memory of this device.
    fn pool(&self) -> Result<sys::CUmemoryPool> {
        // SAFETY: the device is the context's own.
        unsafe { result::device::get_default_mem_pool(self.stream.context().cu_device()) }.map_err(wrapped)
    }

    /// Bytes that can still be had, those that the driver keeps for us among them.
    pub(super) fn free_bytes(&self) -> Result<usize> {
        // What was freed counts as used until the stream comes to it.
        self.stream.synchronize().map_err(wrapped)?;
        let (free, _) = self.stream.context().mem_get_info().map_err(wrapped)?;
        let attribute = |which| {
            let mut bytes = 0u64;
            // SAFETY: as in keep_freed_memory.
            unsafe { result::mem_pool::get_attribute(self.pool()?, which, (&raw mut bytes).cast()) }
                .map_err(wrapped)?;
            Ok::<_, Error>(bytes as usize)
        };
        let kept = attribute(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?;
        let used = attribute(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
        Ok(free + kept.saturating_sub(used))
    }

    /// Memory that holds nothing yet, for so many numbers of a kind.
    pub(super) fn room(&self, n: usize, kind: Kind) -> Result<Buffer> {
        allocate(&self.stream, n * kind.bytes())
    }

    /// Memory for so many numbers of four bytes.
    pub(super) fn words(&self, n: usize) -> Result<Buffer> {
        allocate(&self.stream, n * 4)
    }

    /// Memory with these numbers.
    pub(super) fn upload<T: DeviceRepr + Copy>(&self, values: &[T]) -> Result<Buffer> {
        // SAFETY: plain numbers are plain bytes, of which the card reads no others than these.
        let bytes = unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) };
        let mut buffer = allocate(&self.stream, bytes.len())?;
        if !bytes.is_empty() {
            self.stream.memcpy_htod(bytes, &mut buffer.memory).map_err(wrapped)?;
        }
        Ok(buffer)
    }

    /// The numbers of a buffer; waits for the card.
    pub(super) fn download<T: DeviceRepr + Copy + Default>(&self, buffer: &Buffer, n: usize) -> Result<Vec<T>> {
        let mut values = vec![T::default(); n];
        // SAFETY: as in upload; every pattern of bits is a number.
        let bytes =
            unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast::<u8>(), size_of_val(&values[..])) };
        if !bytes.is_empty() {
            let from = buffer.memory.slice(0..bytes.len());
            self.stream.memcpy_dtoh(&from, bytes).map_err(wrapped)?;
            self.stream.synchronize().map_err(wrapped)?;
        }
        Ok(values)
    }

    pub(super) fn zero(&self, buffer: &mut Buffer) -> Result<()> {
        self.stream.memset_zeros(&mut buffer.memory).map_err(wrapped)
    }

    /// Copies the first bytes of one place to another.
    pub(super) fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        self.stream.context().bind_to_thread().map_err(wrapped)?;
        // SAFETY: callers name places of buffers that they hold.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream.cu_stream()).map_err(wrapped) }
    }

    /// A tensor of zeros, f32, for kernels to write into.
    pub(super) fn tensor(&self, shape: impl Into<Shape>) -> Result<Tensor> {
        Tensor::zeros(shape.into(), DType::F32, &self.device())
    }

    /// Where a contiguous f32 tensor lies.
    pub(super) fn address(&self, tensor: &Tensor) -> Result<u64> {
        let (storage, layout) = tensor.storage_and_layout();
        let (Storage::Cuda(storage), true) = (&*storage, layout.is_contiguous()) else {
            bail!("tensor of shape {:?} is not contiguous on a card", tensor.dims());
        };
        let (at, _) = storage.as_cuda_slice::<f32>()?.device_ptr(&self.stream);
        Ok(at + 4 * layout.start_offset() as u64)
    }

    fn function(&self, name: &str) -> Result<Arc<CudaFunction>> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = functions.get(name) {
            return Ok(function.clone());
        }
        let loaded = self.device.get_or_load_custom_func(name, "grpo", KERNELS);
        let function = loaded.map_err(without_compiler)?.into_cuda_function();
        Ok(functions.entry(name.into()).or_insert(Arc::new(function)).clone())
    }

    /// Launches a kernel that has one form.
    pub(super) fn launch(&self, name: &str, extent: Extent, arguments: &[&dyn Argument]) -> Result<()> {
        let (x, y, z) = extent.grid;
        if x * y * z == 0 {
            return Ok(());
        }
        let function = self.function(name)?;
        let mut launch = self.stream.launch_builder(&function);
        arguments.iter().for_each(|argument| argument.push(&mut launch));
        let config = LaunchConfig {
            grid_dim: (x as u32, y as u32, z as u32),
            block_dim: (extent.threads as u32, 1, 1),
            shared_mem_bytes: extent.shared_bytes as u32,
        };
        // SAFETY: arguments are those that the kernel declares; tests/cuda.rs launches every one of them.
        unsafe { launch.launch(config) }.map_err(wrapped)?;
        Ok(())
    }

    /// Launches a kernel's form for a kind of numbers.
    pub(super) fn launch_for(&self, name: &str, kind: Kind, extent: Extent, arguments: &[&dyn Argument]) -> Result<()> {
        self.launch(&format!("{name}_{}", kind.suffix()), extent, arguments)
    }

    /// `c = a · b + keep · c` by cuBLAS, whose matrices lie in columns.
    pub(super) fn multiply(&self, product: &Product) -> Result<()> {
        let operation = |transposed: bool| match transposed {
            true => blas::cublasOperation_t::CUBLAS_OP_T,
            false => blas::cublasOperation_t::CUBLAS_OP_N,
        };
        let Product { sizes: [m, n, k], left, right, out, keep } = *product;
        let (one, keep) = (1f32, if keep { 1f32 } else { 0f32 });
        let number = |one: &f32| std::ptr::from_ref(one).cast::<c_void>();
        self.stream.context().bind_to_thread().map_err(wrapped)?;
        // SAFETY: the handle is of this stream; places and strides are those of buffers that the caller holds.
        unsafe {
            gemm_ex(
                *self.blas.handle(),
                operation(left.transposed),
                operation(right.transposed),
                m as i32,
                n as i32,
                k as i32,
                number(&one),
                left.at as *const c_void,
                left.kind.of_blas(),
                left.stride as i32,
                right.at as *const c_void,
                right.kind.of_blas(),
                right.stride as i32,
                number(&keep),
                out.at as *mut c_void,
                out.kind.of_blas(),
                out.stride as i32,
                blas::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                blas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
            .map_err(wrapped)
        }
    }

    /// Keeps what `work` asks of the stream, to be done at each [`Gpu::replay`].
    pub(super) fn capture(&self, work: impl FnOnce() -> Result<()>) -> Result<CudaGraph> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream.begin_capture(mode).map_err(wrapped)?;
        let done = work();
        // A capture is ended whatever came of it: the stream would take nothing else.
        let graph = self.stream.end_capture(sys::CUgraphInstantiate_flags(0));
        done?;
        match graph.map_err(wrapped)? {
            Some(graph) => Ok(graph),
            None => bail!("the card kept nothing of a step that was to be captured"),
        }
    }

    /// Does what was captured, once more.
    pub(super) fn replay(&self, graph: &CudaGraph) -> Result<()> {
        graph.launch().map_err(wrapped)
    }
}

fn allocate(stream: &Arc<CudaStream>, bytes: usize) -> Result<Buffer> {
    // SAFETY: what is read before it was written means nothing, and no kernel does so.
    let memory = unsafe { stream.alloc::<u8>(bytes.max(1)) }.map_err(wrapped)?;
    let at = memory.device_ptr(stream).0;
    Ok(Buffer { memory, at })
}

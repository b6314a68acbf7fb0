//! Convolution over `[B, H, W, C]` with its backward, and the reason that it is ours.
//!
//! candle's own `conv2d` has a backward ten times slower than its forward on a CPU. Channels lie together here, so in
//! an image with its border of zeros the window of one output pixel is one slice for each of its rows, and that of the
//! next pixel begins a pixel later: windows are the rows of overlapping matrices that lie in memory as they are, and
//! nothing is gathered. Every element is summed in an order that depends on shapes alone.
//!
//! On other devices the same sum is written with candle's operations, one matrix product per tap.

use std::borrow::Cow;

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Storage, Tensor, bail};
use rayon::prelude::*;

use crate::ops::kernel::{Left, Panels, Product};
use crate::ops::{is_host_f32, vector};

/// Which input pixels an output pixel sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Window {
    /// Taps along each side.
    size: usize,
    /// Input pixels per output pixel, along each side.
    stride: usize,
    /// Zeros before the first pixel; `size - 1 - before` follow the last.
    before: usize,
}

impl Window {
    /// 1 x 1.
    pub(super) const POINT: Self = Self { size: 1, stride: 1, before: 0 };
    /// 3 x 3 with a border of zeros: as many pixels out as in.
    pub(super) const SAME: Self = Self { size: 3, stride: 1, before: 1 };
    /// 3 x 3 with stride 2 and zeros at the right and bottom only: half as many out.
    pub(super) const HALVING: Self = Self { size: 3, stride: 2, before: 0 };

    /// The window that carries the gradient back, over the output's gradient spread out to the input's size.
    fn reversed(self) -> Self {
        Self { stride: 1, before: self.size - 1 - self.before, ..self }
    }

    fn taps(self) -> usize {
        self.size * self.size
    }

    /// Shape of a weight from `inputs` to `outputs` channels: a matrix for 1 x 1, else as PyTorch's.
    pub(super) fn weight_shape(self, outputs: usize, inputs: usize) -> Vec<usize> {
        match self.size {
            1 => vec![outputs, inputs],
            size => vec![outputs, inputs, size, size],
        }
    }
}

/// `x` `[B, H, W, I]`, `weight` as [`Window::weight_shape`] says, `bias` `[O]`: `[B, H / stride, W / stride, O]`.
pub(super) fn convolve(window: Window, x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let (_, h, w, c) = x.dims4()?;
    if h % window.stride != 0 || w % window.stride != 0 || weight.dim(1)? != c {
        bail!("convolution with stride {} of {:?} by {:?}", window.stride, x.dims(), weight.dims());
    }
    if is_host_f32(x) {
        x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, Convolution { window })
    } else {
        by_taps(window, x, weight)?.broadcast_add(bias)
    }
}

/// The convolution as a sum of one matrix product per tap, in operations that every device has.
fn by_taps(window: Window, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (n, h, w, c) = x.dims4()?;
    let (height, width) = (h / window.stride, w / window.stride);
    let outputs = weight.dim(0)?;
    let taps = weight.reshape((outputs, c, window.taps()))?;
    let after = window.size - 1 - window.before;
    let padded = x.pad_with_zeros(1, window.before, after)?.pad_with_zeros(2, window.before, after)?;
    let mut sum: Option<Tensor> = None;
    for tap in 0..window.taps() {
        let seen = every(&padded, 1, tap / window.size, (height, window.stride))?;
        let seen = every(&seen, 2, tap % window.size, (width, window.stride))?;
        let part = taps.narrow(2, tap, 1)?.squeeze(2)?.t()?.contiguous()?;
        let product = seen.reshape((n * height * width, c))?.matmul(&part)?;
        sum = Some(match sum {
            None => product,
            Some(sum) => (sum + product)?,
        });
    }
    match sum {
        Some(sum) => sum.reshape((n, height, width, outputs)),
        None => bail!("a window without taps"),
    }
}

/// `count` entries of a dimension from `start`, one in `stride`.
fn every(x: &Tensor, dim: usize, start: usize, (count, stride): (usize, usize)) -> Result<Tensor> {
    if stride == 1 {
        return x.narrow(dim, start, count);
    }
    let last = start + (count - 1) * stride + 1;
    let indices = Tensor::arange_step(start as u32, last as u32, stride as u32, x.device())?;
    x.contiguous()?.index_select(&indices, dim)
}

struct Convolution {
    window: Window,
}

impl CustomOp3 for Convolution {
    fn name(&self) -> &'static str {
        "convolution"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (n, h, w, inputs) = x_layout.shape().dims4()?;
        let bias = slice(bias, bias_layout)?;
        let panels = panels(self.window, slice(weight, weight_layout)?, inputs);
        let y = Images::new(slice(x, x_layout)?, (h, w, inputs), self.window).times(&panels, bias);
        let shape = (n, h / self.window.stride, w / self.window.stride, bias.len());
        Ok((CpuStorage::F32(y), shape.into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let d_bias = with_slice(dy, |dy| Ok(column_sums(dy, bias.elem_count())))?;
        let dy = spread(dy, self.window.stride)?;
        let dx = if x.track_op() { Some(self.input_gradient(x, weight, &dy)?) } else { None };
        let d_weight = self.weight_gradient(x, weight, &dy)?;
        Ok((dx, Some(d_weight), Some(Tensor::from_vec(d_bias, bias.dims(), bias.device())?)))
    }
}

impl Convolution {
    /// The transposed convolution: the gradient, spread out by the stride, convolved with the turned weight.
    fn input_gradient(&self, x: &Tensor, weight: &Tensor, dy: &Tensor) -> Result<Tensor> {
        let (_, h, w, outputs) = dy.dims4()?;
        let inputs = x.dim(3)?;
        let window = self.window.reversed();
        let turned = with_slice(weight, |weight| Ok(turned(weight, inputs, window.taps())))?;
        let panels = panels(window, &turned, outputs);
        let zeros = vec![0f32; inputs];
        let dx = with_slice(dy, |dy| Ok(Images::new(dy, (h, w, outputs), window).times(&panels, &zeros)))?;
        Tensor::from_vec(dx, x.dims(), x.device())
    }

    /// Image by image, windows times gradients; the images are added in their order.
    fn weight_gradient(&self, x: &Tensor, weight: &Tensor, dy: &Tensor) -> Result<Tensor> {
        let (_, h, w, inputs) = x.dims4()?;
        let outputs = dy.dim(3)?;
        let window = Window { stride: 1, ..self.window };
        let parts =
            with_slice(x, |x| with_slice(dy, |dy| Ok(Images::new(x, (h, w, inputs), window).gradients(dy, outputs))))?;
        let mut sum = vec![0f32; weight.elem_count()]; // [ky, kx, I, O]
        vector::vectorised!(parts.iter().for_each(|part| vector::add(&mut sum, part)));
        let mut gradient = vec![0f32; sum.len()]; // [O, I, ky, kx]
        for (output, gradient) in gradient.chunks_exact_mut(window.taps() * inputs).enumerate() {
            for (tap, sum) in sum.chunks_exact(inputs * outputs).enumerate() {
                let from = sum[output..].iter().step_by(outputs);
                gradient[tap..].iter_mut().step_by(window.taps()).zip(from).for_each(|(to, from)| *to = *from);
            }
        }
        Tensor::from_vec(gradient, weight.dims(), weight.device())
    }
}

/// One right operand for each row of taps: `[size * I, O]` from a weight `[O, I, size, size]`.
fn panels(window: Window, weight: &[f32], inputs: usize) -> Vec<Panels> {
    let (size, depth) = (window.size, window.size * inputs);
    let outputs = weight.len() / (window.taps() * inputs);
    let mut rows = vec![vec![0f32; outputs * depth]; size];
    for (output, weight) in weight.chunks_exact(window.taps() * inputs).enumerate() {
        for tap in 0..window.taps() {
            let target = &mut rows[tap / size][output * depth + (tap % size) * inputs..][..inputs];
            target.iter_mut().zip(weight[tap..].iter().step_by(window.taps())).for_each(|(to, from)| *to = *from);
        }
    }
    rows.iter().map(|rows| Panels::of_rows(rows, outputs, depth)).collect()
}

/// A weight `[O, I, taps]` as `[I, O, taps]` with its taps in reverse.
fn turned(weight: &[f32], inputs: usize, taps: usize) -> Vec<f32> {
    let outputs = weight.len() / (inputs * taps);
    let mut turned = Vec::with_capacity(weight.len());
    for input in 0..inputs {
        for output in 0..outputs {
            turned.extend(weight[(output * inputs + input) * taps..][..taps].iter().rev());
        }
    }
    turned
}

/// A batch of images in memory with their borders of zeros, seen through a window.
struct Images<'a> {
    pixels: Cow<'a, [f32]>,
    /// With the border.
    height: usize,
    width: usize,
    channels: usize,
    window: Window,
}

impl<'a> Images<'a> {
    fn new(pixels: &'a [f32], (height, width, channels): (usize, usize, usize), window: Window) -> Self {
        let border = window.size - 1;
        let pixels = match border {
            0 => Cow::Borrowed(pixels),
            _ => Cow::Owned(with_border(pixels, (height, width, channels), (window.before, border))),
        };
        Self { pixels, height: height + border, width: width + border, channels, window }
    }

    /// Rows and columns of an image's output.
    fn output(&self) -> (usize, usize) {
        let border = self.window.size - 1;
        ((self.height - border) / self.window.stride, (self.width - border) / self.window.stride)
    }

    /// From the first number of the window of an output row's first pixel, at row `tap` of the window.
    fn slice_from(&self, image: usize, row: usize, tap: usize) -> &[f32] {
        &self.pixels[(image * self.height + row * self.window.stride + tap) * self.width * self.channels..]
    }

    /// The convolution: one row of outputs per output pixel.
    fn times(&self, panels: &[Panels], bias: &[f32]) -> Vec<f32> {
        let ((rows, width), outputs) = (self.output(), bias.len());
        let images = self.pixels.len() / (self.height * self.width * self.channels).max(1);
        let mut y = vec![0f32; images * rows * width * outputs];
        y.par_chunks_mut((width * outputs).max(1)).enumerate().for_each(|(index, y)| {
            y.chunks_exact_mut(outputs).for_each(|y| y.copy_from_slice(bias));
            for (tap, right) in panels.iter().enumerate() {
                let data = self.slice_from(index / rows, index % rows, tap);
                let left = Left::Rows { data, stride: self.window.stride * self.channels, rows: width };
                let depth = self.window.size * self.channels;
                Product { left, right, depth, columns: outputs, out: y, out_stride: outputs }.add();
            }
        });
        y
    }

    /// Per image, the gradient of a weight `[ky, kx, I, O]` given that of the outputs; for stride 1.
    ///
    /// An image's windows make one matrix if those that straddle two rows are kept: they meet a gradient of zero.
    fn gradients(&self, dy: &[f32], outputs: usize) -> Vec<Vec<f32>> {
        let (rows, width) = self.output();
        let border = self.window.size - 1;
        let depth = rows * self.width - border;
        let images = dy.par_chunks((rows * width * outputs).max(1)).enumerate();
        let parts = images.map(|(image, dy)| {
            let dy = match border {
                0 => Cow::Borrowed(dy),
                _ => Cow::Owned(widened(dy, width * outputs, border * outputs)),
            };
            let right = Panels::of_matrix(&dy[..depth * outputs], depth, outputs);
            let taps = self.window.size * self.channels;
            let mut gradient = vec![0f32; self.window.size * taps * outputs];
            for (tap, out) in gradient.chunks_exact_mut(taps * outputs).enumerate() {
                let left = Left::Columns { data: self.slice_from(image, 0, tap), stride: self.channels, rows: taps };
                Product { left, right: &right, depth, columns: outputs, out, out_stride: outputs }.add();
            }
            gradient
        });
        parts.collect()
    }
}

/// Images with `border` more rows and columns of zeros, `before` of them at the top and left.
fn with_border(
    pixels: &[f32],
    (height, width, channels): (usize, usize, usize),
    (before, border): (usize, usize),
) -> Vec<f32> {
    let (row, wide) = (width * channels, (width + border) * channels);
    let (image, large) = ((height * row).max(1), (height + border) * wide);
    let mut padded = vec![0f32; pixels.len() / image * large];
    padded.par_chunks_mut(large.max(1)).zip(pixels.par_chunks(image)).for_each(|(padded, image)| {
        let rows = padded.chunks_exact_mut(wide).skip(before);
        rows.zip(image.chunks_exact(row)).for_each(|(to, from)| to[before * channels..][..row].copy_from_slice(from));
    });
    padded
}

/// Rows of `width` numbers, each followed by `more` zeros.
fn widened(values: &[f32], width: usize, more: usize) -> Vec<f32> {
    let mut wide = vec![0f32; values.len() / width * (width + more)];
    wide.chunks_exact_mut(width + more).zip(values.chunks_exact(width)).for_each(|(to, from)| {
        to[..width].copy_from_slice(from);
    });
    wide
}

/// The sum over rows of `width` numbers.
fn column_sums(values: &[f32], width: usize) -> Vec<f32> {
    let mut sums = vec![0f32; width];
    vector::vectorised!(values.chunks_exact(width).for_each(|row| vector::add(&mut sums, row)));
    sums
}

/// Puts zeros between pixels so that the image grows by `stride`; the pixels stay at the top left of their blocks.
fn spread(x: &Tensor, stride: usize) -> Result<Tensor> {
    if stride == 1 {
        return x.contiguous();
    }
    let (n, h, w, c) = x.dims4()?;
    let blocks = x.reshape((n, h, 1, w, 1, c))?.pad_with_zeros(2, 0, stride - 1)?.pad_with_zeros(4, 0, stride - 1)?;
    blocks.reshape((n, h * stride, w * stride, c))
}

/// The numbers of a contiguous f32 storage.
pub(super) fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!("a tensor of shape {:?} is strided where it must be contiguous", layout.dims()),
    }
}

/// Reads a CPU tensor's numbers in place.
pub(super) fn with_slice<T>(tensor: &Tensor, read: impl FnOnce(&[f32]) -> Result<T>) -> Result<T> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => read(slice(storage, layout)?),
        _ => bail!("a tensor on {:?} is read where only the CPU's can be", tensor.device().location()),
    }
}

#[cfg(test)]
#[expect(clippy::excessive_nesting, reason = "differences are taken element by element of each variable")]
mod tests {
    use candle_core::{Device, Var};
    use grpo::Seed;

    use super::*;

    const WINDOWS: [Window; 3] = [Window::POINT, Window::SAME, Window::HALVING];

    fn random(shape: &[usize], name: &str) -> Tensor {
        let mut draws = Seed::new(3).named(name).draws();
        let values = (0..shape.iter().product()).map(|_| draws.normal() as f32).collect::<Vec<_>>();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
        assert_eq!(a.dims(), b.dims());
        (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    /// Input `[2, 4, 6, 3]`, weight to 5 channels, bias.
    fn example(window: Window) -> (Tensor, Tensor, Tensor) {
        (random(&[2, 4, 6, 3], "x"), random(&window.weight_shape(5, 3), "weight"), random(&[5], "bias"))
    }

    /// candle's own convolution, in its layout.
    fn by_candle(window: Window, x: &Tensor, weight: &Tensor, bias: &Tensor) -> Tensor {
        let x = x.permute((0, 3, 1, 2)).unwrap().contiguous().unwrap();
        let weight = weight.reshape((5, 3, window.size, window.size)).unwrap();
        let (x, padding) = match window.stride {
            1 => (x, window.before),
            _ => (x.pad_with_zeros(2, 0, 1).unwrap().pad_with_zeros(3, 0, 1).unwrap(), 0),
        };
        let y = x.conv2d(&weight, padding, window.stride, 1, 1).unwrap();
        y.permute((0, 2, 3, 1)).unwrap().broadcast_add(bias).unwrap()
    }

    #[test]
    fn forward_and_fallback_equal_candles_convolution() {
        for window in WINDOWS {
            let (x, weight, bias) = example(window);
            let expected = by_candle(window, &x, &weight, &bias);
            let got = convolve(window, &x, &weight, &bias).unwrap();
            assert!(largest_difference(&got, &expected) < 1e-5, "{window:?}");
            let composite = by_taps(window, &x, &weight).unwrap().broadcast_add(&bias).unwrap();
            assert!(largest_difference(&composite, &expected) < 1e-5, "{window:?} by taps");
        }
    }

    /// A convolution is linear in each argument, so central differences are exact up to rounding.
    #[test]
    fn gradients_equal_finite_differences() {
        for window in WINDOWS {
            let (x, weight, bias) = example(window);
            let vars = [x, weight, bias].map(|tensor| Var::from_tensor(&tensor).unwrap());
            let loss = |vars: &[Var; 3]| {
                let y = convolve(window, &vars[0], &vars[1], &vars[2]).unwrap();
                (&y * random(y.dims(), "probe")).unwrap().sum_all().unwrap()
            };
            let store = loss(&vars).backward().unwrap();
            for (argument, var) in vars.iter().enumerate() {
                let gradient: Vec<f32> = store.get(var).unwrap().flatten_all().unwrap().to_vec1().unwrap();
                let values: Vec<f32> = var.flatten_all().unwrap().to_vec1().unwrap();
                for index in (0..values.len()).step_by(7) {
                    let at = |step: f32| {
                        let mut moved = values.clone();
                        moved[index] += step;
                        var.set(&Tensor::from_vec(moved, var.dims(), &Device::Cpu).unwrap()).unwrap();
                        loss(&vars).to_scalar::<f32>().unwrap()
                    };
                    let slope = (at(0.5) - at(-0.5)) / 1.0;
                    at(0.0);
                    assert!(
                        (slope - gradient[index]).abs() < 2e-3,
                        "{window:?} {argument}: {slope} {}",
                        gradient[index]
                    );
                }
            }
        }
    }

    #[test]
    fn one_thread_gives_the_bits_of_three() {
        let (x, weight, bias) = (random(&[3, 32, 32, 40], "x"), random(&[24, 40, 3, 3], "w"), random(&[24], "b"));
        let bits = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let weight = Var::from_tensor(&weight).unwrap();
                let y = convolve(Window::SAME, &x, &weight, &bias).unwrap();
                let store = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
                let gradient = store.get(&weight).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
                (y.flatten_all().unwrap().to_vec1::<f32>().unwrap(), gradient)
            })
        };
        assert_eq!(bits(1), bits(3));
    }

    #[test]
    fn odd_sides_cannot_be_halved() {
        let x = random(&[1, 3, 4, 3], "x");
        let (_, weight, bias) = example(Window::HALVING);
        assert!(convolve(Window::HALVING, &x, &weight, &bias).is_err());
    }
}

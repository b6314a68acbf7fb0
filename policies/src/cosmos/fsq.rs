//! Finite scalar quantization (Mentzer et al., 2023, arXiv 2309.15505) as Cosmos uses it.
//!
//! Each channel is squashed by tanh to `levels` integer places; a code is the mixed-radix number of the places, first
//! channel fastest. Always f32, halves round to even.

use candle_core::{Device, Result, Tensor};

/// The places of one channel.
#[derive(Clone, Copy, Debug)]
struct Channel {
    level: u32,
    half: f32,
    offset: f32,
    shift: f32,
}

impl Channel {
    fn new(level: u32) -> Self {
        let half = (level - 1) as f32 * (1.0 + 1e-3) / 2.0;
        let offset = if level.is_multiple_of(2) { 0.5 } else { 0.0 };
        Self { level, half, offset, shift: (offset / half).atanh() }
    }

    /// The middle place, which stands for the value 0.
    fn middle(self) -> u32 {
        self.level / 2
    }

    fn place(self, latent: f32) -> u32 {
        let bounded = (latent + self.shift).tanh() * self.half - self.offset;
        // In 0..level by the bound of tanh; the clamp also gives a NaN a place.
        (bounded.round_ties_even() + self.middle() as f32).clamp(0.0, (self.level - 1) as f32) as u32
    }

    fn value(self, place: u32) -> f32 {
        (place as f32 - self.middle() as f32) / self.middle() as f32
    }
}

/// The quantizer of a list of levels.
#[derive(Clone, Debug)]
pub(super) struct Fsq(Vec<Channel>);

impl Fsq {
    pub(super) fn new(levels: &[u32]) -> Self {
        Self(levels.iter().map(|&level| Channel::new(level)).collect())
    }

    /// How many codes there are.
    pub(super) fn n_codes(&self) -> u32 {
        self.0.iter().map(|channel| channel.level).product()
    }

    /// The code of one latent vector.
    pub(super) fn code(&self, latent: &[f32]) -> u32 {
        let places = self.0.iter().zip(latent).map(|(channel, &z)| (channel.level, channel.place(z)));
        places.rev().fold(0, |code, (level, place)| code * level + place)
    }

    /// Appends the vector that a code stands for.
    pub(super) fn push_values(&self, code: u32, values: &mut Vec<f32>) {
        let mut rest = code;
        for channel in &self.0 {
            values.push(channel.value(rest % channel.level));
            rest /= channel.level;
        }
    }

    /// Quantized values of `[.., D]` latents, with the gradient of the squashing: rounding passes it straight through.
    pub(super) fn straight_through(&self, latents: &Tensor) -> Result<Tensor> {
        let device = latents.device();
        let bounded = latents
            .broadcast_add(&self.row(device, |channel| channel.shift)?)?
            .tanh()?
            .broadcast_mul(&self.row(device, |channel| channel.half)?)?
            .broadcast_sub(&self.row(device, |channel| channel.offset)?)?;
        let places: Vec<f32> = bounded.flatten_all()?.to_vec1()?;
        let rounded: Vec<f32> = places.iter().map(|place| place.round_ties_even()).collect();
        let rounded = Tensor::from_vec(rounded, bounded.dims(), device)?;
        let correction = (rounded - bounded.detach())?;
        (bounded + correction)?.broadcast_div(&self.row(device, |channel| channel.middle() as f32)?)
    }

    fn row(&self, device: &Device, number: impl Fn(&Channel) -> f32) -> Result<Tensor> {
        Tensor::from_vec(self.0.iter().map(number).collect::<Vec<f32>>(), self.0.len(), device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cosmos() -> Fsq {
        Fsq::new(&[8, 8, 8, 5, 5, 5])
    }

    fn values(code: u32) -> Vec<f32> {
        let mut values = Vec::new();
        cosmos().push_values(code, &mut values);
        values
    }

    /// Values of NVIDIA's quantizer, run once for the specification of this port.
    #[test]
    fn codes_and_values_are_those_of_cosmos() {
        assert_eq!(cosmos().n_codes(), 64_000);
        assert_eq!(values(0), [-1.0; 6]);
        assert_eq!(values(63_999), [0.75, 0.75, 0.75, 1.0, 1.0, 1.0]);
        assert_eq!(values(1), [-0.75, -1.0, -1.0, -1.0, -1.0, -1.0]);
        assert_eq!(values(8), [-1.0, -0.75, -1.0, -1.0, -1.0, -1.0]);
        assert_eq!(cosmos().code(&[0.0; 6]), 32_036);
        assert_eq!(cosmos().code(&[0.3, -0.4, 0.9, 0.2, -0.7, 1.1]), 55_197);
    }

    #[test]
    fn every_code_returns_to_itself() {
        let fsq = cosmos();
        for code in 0..fsq.n_codes() {
            let mut places = Vec::new();
            fsq.push_values(code, &mut places);
            // The latent whose squashed place is the centre of the value's cell.
            let latent: Vec<f32> = places
                .iter()
                .zip(&fsq.0)
                .map(|(value, c)| ((value * c.middle() as f32 + c.offset) / c.half).atanh() - c.shift)
                .collect();
            assert_eq!(fsq.code(&latent), code);
        }
    }

    #[test]
    fn extreme_latents_have_codes() {
        for latent in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e30] {
            assert!(cosmos().code(&[latent; 6]) < 64_000);
        }
    }

    #[test]
    fn straight_through_values_are_those_of_the_codes() {
        let fsq = cosmos();
        let latents: Vec<f32> = (0..60).map(|i| ((i * 29) % 60) as f32 / 15.0 - 2.0).collect();
        let expected: Vec<f32> = latents.chunks(6).flat_map(|latent| values(fsq.code(latent))).collect();
        let tensor = Tensor::from_vec(latents, (2, 5, 6), &Device::Cpu).unwrap();
        let got: Vec<f32> = fsq.straight_through(&tensor).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        for (got, expected) in got.iter().zip(&expected) {
            assert!((got - expected).abs() < 1e-6, "{got} {expected}");
        }
    }
}

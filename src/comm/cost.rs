//! What a collective costs, by the alpha-beta model: `t = hops · alpha + bytes / bandwidth`.
//!
//! It chooses between algorithms and explains the choice; it predicts no clock.

use super::links::{Link, Links};

/// A kind of link: what a hop costs and what it carries one way.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Wire {
    /// Microseconds from the writing of a flag to what is behind the wait for it.
    pub alpha_us: f64,
    /// Bytes a second, one way, of one rank's links together.
    pub bandwidth: f64,
}

impl Wire {
    /// The links between `links`' ranks on devices of this compute capability (90 for 9.0).
    ///
    /// One-way peaks from NVIDIA's data sheets: NVLink of A100 300 GB/s, H100 450, B200 900;
    /// PCIe 4 x16 32 GB/s. The hop over NVLink is chosen so that the cross-over between one-shot
    /// and two-shot comes out where vLLM measured it on eight H100 (256 KiB; `S = alpha ·
    /// bandwidth · N / ((N-1)(N-2))` gives 211 KB); that over PCIe is an estimate.
    pub fn of(links: &Links, compute_capability: u32) -> Self {
        match links.slowest() {
            Link::Pcie => Self {
                alpha_us: 5.0,
                bandwidth: 32e9,
            },
            _ => Self {
                alpha_us: 2.46,
                bandwidth: match compute_capability {
                    ..=89 => 300e9,
                    90..=99 => 450e9,
                    _ => 900e9,
                },
            },
        }
    }

    /// Microseconds of `hops` hops one after another and `bytes` through a rank's links.
    pub fn time_us(&self, hops: usize, bytes: usize) -> f64 {
        hops as f64 * self.alpha_us + bytes as f64 / self.bandwidth * 1e6
    }
}

#[cfg(test)]
mod tests {
    use super::{Link, Links, Wire};

    #[test]
    fn one_shot_and_two_shot_cross_where_the_closed_form_says() {
        let links = Links::new(8, |_, _| Link::Nvlink);
        let wire = Wire::of(&links, 90);
        for n in 3..=8 {
            let closed =
                wire.alpha_us / 1e6 * wire.bandwidth * n as f64 / ((n - 1) * (n - 2)) as f64;
            let one = |bytes: usize| wire.time_us(1, (n - 1) * bytes);
            let two = |bytes: usize| wire.time_us(2, 2 * bytes * (n - 1) / n);
            let near = closed as usize;
            assert!(one(near * 99 / 100) < two(near * 99 / 100), "N = {n}");
            assert!(one(near * 101 / 100) > two(near * 101 / 100), "N = {n}");
        }
    }
}

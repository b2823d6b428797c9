//! What is known of the ways between devices, and what they are good for.
//!
//! Arithmetic only: `p2p` fills it in from the driver and from its probe.

use std::fmt;

/// The way by which one rank's device writes into another's memory and reads from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Link {
    /// Both ranks are on one device.
    SameDevice,
    /// NVLink, or what behaves as it: the driver reports native atomics.
    Nvlink,
    /// The PCI bus.
    Pcie,
    /// The driver gives no access.
    NoAccess,
    /// The driver gives access, and the probe shows that it does not work; how.
    Broken(String),
}

impl Link {
    /// Whether a collective may use it.
    pub fn is_good(&self) -> bool {
        matches!(self, Self::SameDevice | Self::Nvlink | Self::Pcie)
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SameDevice => f.write_str("same device"),
            Self::Nvlink => f.write_str("NVLink"),
            Self::Pcie => f.write_str("PCIe"),
            Self::NoAccess => f.write_str("no access"),
            Self::Broken(how) => write!(f, "broken: {how}"),
        }
    }
}

/// The ways between all pairs of ranks, each direction for itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Links {
    world_size: usize,
    /// `[from][to]`; a rank to itself is [`Link::SameDevice`].
    ways: Vec<Link>,
}

impl Links {
    /// `way(from, to)` for every pair of `world_size` ranks.
    pub fn new(world_size: usize, mut way: impl FnMut(usize, usize) -> Link) -> Self {
        let ways = (0..world_size * world_size)
            .map(|at| match (at / world_size, at % world_size) {
                (from, to) if from == to => Link::SameDevice,
                (from, to) => way(from, to),
            })
            .collect();
        Self { world_size, ways }
    }

    /// The number of ranks.
    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// The way by which `from` reaches `to`.
    pub fn get(&self, from: usize, to: usize) -> &Link {
        &self.ways[from * self.world_size + to]
    }

    /// Replaces it.
    pub fn set(&mut self, from: usize, to: usize, link: Link) {
        self.ways[from * self.world_size + to] = link;
    }

    /// Whether two ranks reach each other.
    pub fn is_pair(&self, one: usize, other: usize) -> bool {
        self.get(one, other).is_good() && self.get(other, one).is_good()
    }

    /// Bit p: `rank` and rank p reach each other.
    pub fn reachable(&self, rank: usize) -> u32 {
        let pairs = (0..self.world_size).filter(|&peer| self.is_pair(rank, peer));
        pairs.fold(0, |mask, peer| mask | 1 << peer)
    }

    /// The pairs that cannot talk to each other.
    pub fn gaps(&self) -> impl Iterator<Item = (usize, usize)> {
        let pairs = (0..self.world_size).flat_map(|a| (0..a).map(move |b| (b, a)));
        pairs.filter(|&(a, b)| !self.is_pair(a, b))
    }

    /// Whether every rank reaches every other.
    pub fn is_mesh(&self) -> bool {
        self.gaps().next().is_none()
    }

    /// An order of the ranks in which each reaches the next, and the last the first; rank 0
    /// comes first. NVLinks are preferred over the bus. `None` if there is none.
    pub fn ring(&self) -> Option<Vec<usize>> {
        let nvlink = |a: usize, b: usize| {
            let is = |link: &Link| matches!(link, Link::Nvlink | Link::SameDevice);
            is(self.get(a, b)) && is(self.get(b, a))
        };
        self.ring_over(&nvlink)
            .or_else(|| self.ring_over(&|a, b| self.is_pair(a, b)))
    }

    fn ring_over(&self, joined: &dyn Fn(usize, usize) -> bool) -> Option<Vec<usize>> {
        let mut order = vec![0];
        self.extend(&mut order, joined).then_some(order)
    }

    /// Depth-first search for a Hamiltonian cycle: at most 7! orders of 8 ranks.
    fn extend(&self, order: &mut Vec<usize>, joined: &dyn Fn(usize, usize) -> bool) -> bool {
        let last = order[order.len() - 1];
        if order.len() == self.world_size {
            return self.world_size == 1 || joined(last, order[0]);
        }
        for next in 0..self.world_size {
            if order.contains(&next) || !joined(last, next) {
                continue;
            }
            order.push(next);
            if self.extend(order, joined) {
                return true;
            }
            order.pop();
        }
        false
    }

    /// The slowest kind of link that a collective over all pairs, or over the ring, would use.
    pub fn slowest(&self) -> Link {
        let worst = |link: &Link| match link {
            Link::SameDevice => 0,
            Link::Nvlink => 1,
            _ => 2,
        };
        let good = self.ways.iter().filter(|link| link.is_good());
        good.max_by_key(|link| worst(link))
            .cloned()
            .unwrap_or(Link::SameDevice)
    }
}

#[cfg(test)]
mod tests {
    use super::{Link, Links};

    fn from_pairs(world_size: usize, pairs: &[(usize, usize)]) -> Links {
        Links::new(world_size, |a, b| {
            if pairs.contains(&(a, b)) || pairs.contains(&(b, a)) {
                Link::Nvlink
            } else {
                Link::NoAccess
            }
        })
    }

    /// Whether an order is a ring over good links with every rank in it once.
    fn is_ring(links: &Links, order: &[usize]) -> bool {
        let n = links.world_size();
        let mut sorted = order.to_vec();
        sorted.sort_unstable();
        sorted == (0..n).collect::<Vec<_>>()
            && (0..n).all(|i| links.is_pair(order[i], order[(i + 1) % n]))
    }

    #[test]
    fn a_ring_is_found_exactly_where_some_order_of_the_ranks_is_one() {
        // Every graph of five ranks.
        let pairs: Vec<(usize, usize)> = (0..5).flat_map(|a| (0..a).map(move |b| (b, a))).collect();
        let mut rings = 0;
        for mask in 0..1u32 << pairs.len() {
            let chosen: Vec<_> = (0..pairs.len())
                .filter(|i| mask >> i & 1 != 0)
                .map(|i| pairs[i])
                .collect();
            let links = from_pairs(5, &chosen);
            let mut any = false;
            permutations(&mut vec![0], &mut |order| any |= is_ring(&links, order));
            let found = links.ring();
            assert_eq!(found.is_some(), any, "{chosen:?}");
            if let Some(order) = found {
                assert!(is_ring(&links, &order), "{chosen:?}: {order:?}");
                rings += 1;
            }
        }
        // The labelled graphs of five vertices with a Hamiltonian cycle (OEIS A326208).
        assert_eq!(rings, 218);
    }

    fn permutations(order: &mut Vec<usize>, visit: &mut dyn FnMut(&[usize])) {
        if order.len() == 5 {
            return visit(order);
        }
        for next in 0..5 {
            if !order.contains(&next) {
                order.push(next);
                permutations(order, visit);
                order.pop();
            }
        }
    }

    #[test]
    fn a_way_that_is_good_in_one_direction_alone_is_a_gap() {
        let mut links = from_pairs(3, &[(0, 1), (1, 2), (0, 2)]);
        assert!(links.is_mesh());
        links.set(2, 1, Link::Broken("writes are lost".into()));
        assert_eq!(links.gaps().collect::<Vec<_>>(), [(1, 2)]);
        assert_eq!(links.reachable(1), 0b011);
        assert_eq!(links.ring(), None);
    }

    #[test]
    fn nvlinks_are_preferred_over_the_bus() {
        // 0-2-1-3 are joined by NVLink, the rest by the bus.
        let nvlinks = [(0, 2), (1, 2), (1, 3), (0, 3)];
        let links = Links::new(4, |a, b| {
            if nvlinks.contains(&(a.min(b), a.max(b))) {
                Link::Nvlink
            } else {
                Link::Pcie
            }
        });
        assert_eq!(links.ring(), Some(vec![0, 2, 1, 3]));
        assert_eq!(links.slowest(), Link::Pcie);
    }
}

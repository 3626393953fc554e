//! Proofs over a Merkle tree: that a leaf is in it, that a longer tree goes on from a shorter one.
//!
//! Both kinds are those of RFC 9162 (Certificate Transparency 2.0), section 2.1.3 and 2.1.4, which are the
//! ones of RFC 6962.
use super::Hash;
use super::merkle::{node_hash, root_of};

/// The hashes that lead from the leaf at `index` up to the root; None where there is no such leaf.
///
/// RFC 9162, section 2.1.3.1.
pub fn inclusion(leaves: &[Hash], index: usize) -> Option<Vec<Hash>> {
    if index >= leaves.len() {
        return None;
    }
    let (mut rest, mut place, mut path) = (leaves, index, Vec::new());
    while rest.len() > 1 {
        let (left, right) = rest.split_at(split(rest.len()));
        if place < left.len() {
            path.push(root_of(right.iter().copied()));
            rest = left;
        } else {
            path.push(root_of(left.iter().copied()));
            place -= left.len();
            rest = right;
        }
    }
    path.reverse();
    Some(path)
}

/// The root that follows from a leaf's hash and its proof; None where the proof's length is wrong.
///
/// RFC 9162, section 2.1.3.2.
pub fn root_of_inclusion(leaf: Hash, index: u64, size: u64, path: &[Hash]) -> Option<Hash> {
    if index >= size {
        return None;
    }
    let (mut place, mut last, mut found) = (index, size - 1, leaf);
    for step in path {
        if last == 0 {
            return None;
        }
        if place & 1 == 1 || place == last {
            found = node_hash(step, &found);
            if place & 1 == 0 {
                let zeros = place.trailing_zeros().min(63);
                place >>= zeros;
                last >>= zeros;
            }
        } else {
            found = node_hash(&found, step);
        }
        place >>= 1;
        last >>= 1;
    }
    (last == 0).then_some(found)
}

/// The hashes that show that the tree over `leaves` goes on from the one over its first `old`.
///
/// RFC 9162, section 2.1.4.1; empty for trees of the same size and for an empty old one. None where `old`
/// is more than there are.
pub fn consistency(leaves: &[Hash], old: usize) -> Option<Vec<Hash>> {
    if old > leaves.len() {
        return None;
    }
    let mut path = Vec::new();
    if old == 0 || old == leaves.len() {
        return Some(path);
    }
    // "whole": is the subtree at hand one that the verifier knows from the old root?
    let (mut rest, mut old, mut whole) = (leaves, old, true);
    while old < rest.len() {
        let (left, right) = rest.split_at(split(rest.len()));
        if old <= left.len() {
            path.push(root_of(right.iter().copied()));
            rest = left;
        } else {
            path.push(root_of(left.iter().copied()));
            old -= left.len();
            whole = false;
            rest = right;
        }
    }
    if !whole {
        path.push(root_of(rest.iter().copied()));
    }
    path.reverse();
    Some(path)
}

/// Does the tree of the new size and root go on from the one of the old size and root?
///
/// RFC 9162, section 2.1.4.2. Every tree goes on from the empty one.
pub fn is_consistent(old: (u64, Hash), new: (u64, Hash), path: &[Hash]) -> bool {
    let ((old_size, old_root), (new_size, new_root)) = (old, new);
    if old_size > new_size {
        return false;
    }
    if old_size == 0 {
        return path.is_empty() && old_root == root_of([]);
    }
    if old_size == new_size {
        return path.is_empty() && old_root == new_root;
    }
    let (mut place, mut last) = (old_size - 1, new_size - 1);
    let ones = place.trailing_ones();
    place >>= ones;
    last >>= ones;
    let mut steps = path.iter();
    let Some(first) = (if place == 0 {
        Some(&old_root)
    } else {
        steps.next()
    }) else {
        return false;
    };
    let (mut of_old, mut of_new) = (*first, *first);
    for step in steps {
        if last == 0 {
            return false;
        }
        if place & 1 == 1 || place == last {
            of_old = node_hash(step, &of_old);
            of_new = node_hash(step, &of_new);
            if place & 1 == 0 {
                let zeros = place.trailing_zeros().min(63);
                place >>= zeros;
                last >>= zeros;
            }
        } else {
            of_new = node_hash(&of_new, step);
        }
        place >>= 1;
        last >>= 1;
    }
    last == 0 && of_old == old_root && of_new == new_root
}

/// The largest power of two smaller than `size`, which is at least two.
fn split(size: usize) -> usize {
    1 << (usize::BITS - 1 - (size - 1).leading_zeros())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::merkle::leaf_hash;
    use proptest::prelude::*;

    fn tree(leaves: &[Hash]) -> Hash {
        root_of(leaves.iter().copied())
    }

    fn leaves(count: usize) -> Vec<Hash> {
        (0..count)
            .map(|number| leaf_hash(&number.to_be_bytes()))
            .collect()
    }

    fn hash(text: &str) -> Hash {
        let mut found = [0; 32];
        for (place, byte) in found.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * place..2 * place + 2], 16).unwrap();
        }
        found
    }

    /// The eight inputs and the proofs of the reference tests of RFC 6962's authors
    /// (certificate-transparency, `merkletree/merkle_tree_test.cc`).
    fn reference() -> Vec<Hash> {
        [
            "",
            "00",
            "10",
            "2021",
            "3031",
            "40414243",
            "5051525354555657",
            "606162636465666768696a6b6c6d6e6f",
        ]
        .iter()
        .map(|text| {
            let bytes: Vec<u8> = (0..text.len() / 2)
                .map(|place| u8::from_str_radix(&text[2 * place..2 * place + 2], 16).unwrap())
                .collect();
            leaf_hash(&bytes)
        })
        .collect()
    }

    #[test]
    fn proofs_of_the_reference_vectors() {
        let all = reference();
        let path = |size: usize, index| inclusion(&all[..size], index).unwrap();
        assert!(path(1, 0).is_empty());
        assert_eq!(
            path(8, 0),
            [
                "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
                "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
                "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
            ]
            .map(hash)
        );
        assert_eq!(
            path(8, 5),
            [
                "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
                "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
                "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
            ]
            .map(hash)
        );
        assert_eq!(
            path(3, 2),
            ["fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"].map(hash)
        );
        assert_eq!(
            consistency(&all, 1).unwrap(),
            [
                "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
                "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
                "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
            ]
            .map(hash)
        );
        assert_eq!(
            consistency(&all, 6).unwrap(),
            [
                "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
                "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
                "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
            ]
            .map(hash)
        );
        assert!(consistency(&all, 8).unwrap().is_empty());
    }

    #[test]
    fn every_proof_of_every_small_tree_holds_and_no_other() {
        for size in 1..=40_usize {
            let all = leaves(size);
            let root = tree(&all);
            for index in 0..size {
                let path = inclusion(&all, index).unwrap();
                let found = root_of_inclusion(all[index], index as u64, size as u64, &path);
                assert_eq!(found, Some(root));
                for other in (0..size).filter(|other| *other != index) {
                    let found = root_of_inclusion(all[index], other as u64, size as u64, &path);
                    assert_ne!(found, Some(root), "{index} of {size} passes for {other}");
                }
            }
            for old in 0..=size {
                let path = consistency(&all, old).unwrap();
                let before = (old as u64, tree(&all[..old]));
                assert!(
                    is_consistent(before, (size as u64, root), &path),
                    "{old} to {size}"
                );
            }
        }
        assert_eq!(inclusion(&leaves(3), 3), None);
        assert_eq!(consistency(&leaves(3), 4), None);
        assert_eq!(root_of_inclusion([0; 32], 0, 0, &[]), None);
    }

    proptest! {
        #[test]
        fn a_damaged_proof_never_holds(
            size in 2_usize..300,
            at in any::<prop::sample::Index>(),
            step in any::<prop::sample::Index>(),
            bit in 0_usize..256,
        ) {
            let all = leaves(size);
            let root = tree(&all);
            let index = at.index(size);
            let mut path = inclusion(&all, index).unwrap();
            let place = step.index(path.len());
            path[place][bit / 8] ^= 1 << (bit % 8);
            let (index, whole) = (index as u64, size as u64);
            let leaf = all[at.index(size)];
            prop_assert_ne!(root_of_inclusion(leaf, index, whole, &path), Some(root));
            path.pop();
            prop_assert_ne!(root_of_inclusion(leaf, index, whole, &path), Some(root));

            let old = 1 + at.index(size - 1);
            let before = (old as u64, tree(&all[..old]));
            let mut path = consistency(&all, old).unwrap();
            let place = step.index(path.len());
            path[place][bit / 8] ^= 1 << (bit % 8);
            prop_assert!(!is_consistent(before, (whole, root), &path));
        }

        #[test]
        fn arbitrary_input_is_refused_not_a_panic(
            index in any::<u64>(),
            size in any::<u64>(),
            path in prop::collection::vec(any::<[u8; 32]>(), 0..80),
        ) {
            let root = tree(&leaves(5));
            prop_assert_ne!(root_of_inclusion([7; 32], index, size, &path), Some(root));
            prop_assert!(!is_consistent((index.max(1), [7; 32]), (size, root), &path));
        }
    }
}

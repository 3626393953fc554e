//! What `chase.lua` answers.

use crate::wire::Value;
use dotmac_core::locks::Victim;
use dotmac_core::locks::graph::{Graph, Holding, Taken, Wait};
use std::sync::Arc;

/// Adds an answer; of one that is not understood, what can be.
pub fn add(graph: &mut Graph, answer: &Value) {
    let [requests, locks] = answer.items() else {
        return;
    };
    for cells in requests.items().chunks_exact(8) {
        if let Some(wait) = wait(cells) {
            graph.add_wait(wait);
        }
    }
    let mut rest = locks.items();
    while let [name, permits, count, more @ ..] = rest {
        let (Some(name), Some(permits), Some(count)) = (text(name), permits.text(), count.int())
        else {
            return;
        };
        let Some((holders, more)) = usize::try_from(count)
            .ok()
            .and_then(|count| more.split_at_checked(count.checked_mul(4)?))
        else {
            return;
        };
        let by = holders.chunks_exact(4).filter_map(holding).collect();
        let permits = permits.parse().ok();
        graph.add_lock(name, Taken { permits, by });
        rest = more;
    }
}

fn text(value: &Value) -> Option<Arc<str>> {
    value.text().map(Arc::from)
}

fn wait(cells: &[Value]) -> Option<Wait> {
    let [request, lock, rank, held, victim, owners, process, place] = cells else {
        return None;
    };
    Some(Wait {
        request: text(request)?,
        lock: text(lock)?,
        owners: owners.text()?.split('\u{1}').map(Arc::from).collect(),
        order: rank.text()?.get(..4)?.parse().ok()?,
        held: u32::try_from(held.int()?).unwrap_or(u32::MAX),
        victim: match &*victim.text()? {
            "p" => Victim::LowestPriority,
            "l" => Victim::FewestLocks,
            "s" => Victim::Closer,
            _ => Victim::Youngest,
        },
        process: text(process)?,
        place: text(place)?,
    })
}

fn holding(cells: &[Value]) -> Option<Holding> {
    let [owner, fence, since, place] = cells else {
        return None;
    };
    Some(Holding {
        owner: text(owner)?,
        fence: fence.int()?.unsigned_abs(),
        since: since.int()?.unsigned_abs(),
        place: text(place)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(cells: &[&str]) -> Value {
        let bytes = |cell: &&str| Value::Bytes(cell.as_bytes().to_vec().into());
        Value::List(cells.iter().map(bytes).collect())
    }

    #[test]
    fn an_answer_is_added_and_half_an_answer_as_far_as_it_goes() {
        let requests = list(&[
            "s.0:1",
            "a",
            "500017",
            "2",
            "p",
            "o1\u{1}o2",
            "{}",
            "f.py:1",
        ]);
        let locks = list(&[
            "a", "", "1", "o3", "77", "5", "g.py:2", "k", "2", "0", "broken", "",
        ]);
        let mut graph = Graph::default();
        add(&mut graph, &Value::List(vec![requests, locks]));
        let mut expected = Graph::default();
        expected.add_wait(Wait {
            request: "s.0:1".into(),
            lock: "a".into(),
            owners: vec!["o1".into(), "o2".into()],
            order: 5000,
            held: 2,
            victim: Victim::LowestPriority,
            process: "{}".into(),
            place: "f.py:1".into(),
        });
        let by = vec![Holding {
            owner: "o3".into(),
            fence: 77,
            since: 5,
            place: "g.py:2".into(),
        }];
        expected.add_lock("a".into(), Taken { permits: None, by });
        let (permits, by) = (Some(2), Vec::new());
        expected.add_lock("k".into(), Taken { permits, by });
        assert_eq!(graph, expected);
        add(&mut graph, &Value::Nil);
        assert_eq!(graph, expected);
    }
}

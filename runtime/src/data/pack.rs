//! Several texts in a row.

use std::collections::BTreeMap;

use super::batch::Tokens;

/// Puts texts together to rows of up to `longest` tokens: the longest first, each into the fullest row that has room for
/// it, of equally full ones the first (best fit decreasing; Johnson 1973: at most 11/9 of the fewest rows, and one).
/// Texts keep their tokens; which stand together depends on their lengths and order only.
pub(super) fn pack(texts: Vec<Tokens>, longest: usize) -> Vec<Tokens> {
    let mut order: Vec<usize> = (0..texts.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(texts[i].len()));
    let mut texts: Vec<Option<Tokens>> = texts.into_iter().map(Some).collect();
    let mut rows: Vec<Tokens> = Vec::new();
    // Room that is left -> rows that have it, the first one last.
    let mut room: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for i in order {
        let text = texts[i].take().expect("every text is taken once");
        let len = text.len();
        let (at, left) = match room.range(len..).next().map(|(&left, _)| left) {
            Some(left) => {
                let all = room.get_mut(&left).expect("it was found");
                let at = all.pop().expect("rows without room are not kept");
                if all.is_empty() {
                    room.remove(&left);
                }
                rows[at].append(text);
                (at, left - len)
            }
            None => {
                rows.push(text.first());
                (rows.len() - 1, longest.saturating_sub(len))
            }
        };
        let all = room.entry(left).or_default();
        let place = all.partition_point(|&other| other > at);
        all.insert(place, at);
    }
    rows
}

/// Puts texts one after the other and cuts them into rows of `longest` tokens; the last row may have fewer.
pub(super) fn cut(texts: Vec<Tokens>, longest: usize) -> Vec<Tokens> {
    let mut rows: Vec<Tokens> = Vec::new();
    for mut text in texts {
        while text.len() > 0 {
            let room = rows.last().map_or(0, |row| longest - row.len());
            let rest = text.split_off(if room > 0 { room } else { longest });
            match rows.last_mut() {
                Some(row) if room > 0 => row.append(text),
                _ => rows.push(text.first()),
            }
            text = rest;
        }
    }
    rows
}

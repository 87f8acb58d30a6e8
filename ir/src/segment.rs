//! Segments: which text of its row a column belongs to, and who sees whom.
//!
//! A segment is `text + branch * BRANCH`. Text 0 is padding, 1, 2, .. are the texts of the row. Branch 0 is the common
//! beginning of a text; branches 1, 2, .. are ways in which it goes on. They see the beginning and themselves, never each
//! other, so two answers to one question can stand in one row with the question once.

/// Factor on the branch.
pub const BRANCH: i32 = 1 << 20;

/// The text, 0 for padding.
#[inline]
pub fn text(segment: i32) -> i32 {
    segment & (BRANCH - 1)
}

/// The branch of the text times [`BRANCH`], 0 for its beginning.
#[inline]
pub fn branch(segment: i32) -> i32 {
    segment & !(BRANCH - 1)
}

/// Whether a query of the segment `query` sees a key of the segment `key`. Padding sees all text of its branch, as in
/// Hugging Face's models, and nobody sees padding.
#[inline]
pub fn sees(query: i32, key: i32) -> bool {
    let same_text = text(key) != 0 && (text(query) == text(key) || text(query) == 0);
    same_text && (branch(key) == 0 || branch(key) == branch(query))
}

/// Whether a column of the segment `earlier` counts in the place of a later one of the segment `own`: the columns of one
/// text before it; on padding, all of its branch.
#[inline]
pub fn counts(own: i32, earlier: i32) -> bool {
    let same_text = text(own) == text(earlier) || text(own) == 0;
    same_text && (branch(earlier) == 0 || branch(earlier) == branch(own))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn branches_see_the_beginning_and_themselves() {
        let (one, two) = (1 + BRANCH, 1 + 2 * BRANCH);
        let seen = |query: i32| [0, 1, 2, one, two].map(|key| sees(query, key));
        assert_eq!(seen(1), [false, true, false, false, false]);
        assert_eq!(seen(one), [false, true, false, true, false]);
        assert_eq!(seen(2), [false, false, true, false, false]);
        // Padding, also at the end of a branch.
        assert_eq!(seen(0), [false, true, true, false, false]);
        assert_eq!(seen(2 * BRANCH), [false, true, true, false, true]);
        assert!([0, 1, two].iter().all(|&earlier| counts(2 * BRANCH, earlier)));
        assert!(!counts(2 * BRANCH, one) && !counts(two, one) && !counts(two, 2) && counts(two, 1));
    }
}

//! Products outside of a program, for whoever measures them.

use half::bf16;

use super::super::memory::Ptr;
use super::super::parallel::Threads;
use super::{Element, Matrix, Product, workspace};

/// How a matrix lies in its slice, without gaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Row after row.
    Rows,
    /// Column after column.
    Columns,
}

/// Threads and workspace for products of at most some size.
pub struct Products {
    threads: Threads,
    scratch: Vec<[u8; 64]>,
}

impl Products {
    /// For products of at most so many rows, columns and elements of a sum.
    pub fn new(threads: usize, size: (usize, usize, usize)) -> Products {
        let threads = Threads::new(threads);
        let bytes = workspace(size, threads.count());
        Products { threads, scratch: vec![[0; 64]; bytes / 64 + 1] }
    }

    /// `out = left * right` of `m` rows, `n` columns and sums of `k`; `out` lies row after row.
    ///
    /// # Panics
    /// If a slice has not the elements of its matrix.
    pub fn f32(
        &mut self,
        size: (usize, usize, usize),
        left: (&[f32], Layout),
        right: (&[f32], Layout),
        out: &mut [f32],
    ) {
        self.run(size, left, right, out);
    }

    /// The same of bf16, summed and given in f32.
    ///
    /// # Panics
    /// As `f32`.
    pub fn bf16(
        &mut self,
        size: (usize, usize, usize),
        left: (&[bf16], Layout),
        right: (&[bf16], Layout),
        out: &mut [f32],
    ) {
        self.run(size, left, right, out);
    }

    fn run<T: Element>(
        &mut self,
        (m, n, k): (usize, usize, usize),
        left: (&[T], Layout),
        right: (&[T], Layout),
        out: &mut [f32],
    ) {
        let matrix = |(slice, layout): (&[T], Layout), rows: usize, columns: usize| {
            assert_eq!(slice.len(), rows * columns, "a matrix has {rows} rows and {columns} columns");
            let (row, column) = if layout == Layout::Rows { (columns, 1) } else { (1, rows) };
            Matrix { at: Ptr(slice.as_ptr().cast_mut()), row, column }
        };
        assert_eq!(out.len(), m * n, "the result has {m} rows and {n} columns");
        let bytes = workspace((m, n, k), self.threads.count());
        assert!(bytes < self.scratch.len() * 64, "the products are larger than was said");
        let at: *mut u8 = self.scratch.as_mut_ptr().cast();
        let product = Product {
            threads: Some(&self.threads),
            size: (m, n, k),
            left: matrix(left, m, k),
            right: matrix(right, k, n),
            out: Matrix { at: Ptr(out.as_mut_ptr()), row: n, column: 1 },
            accumulate: false,
            finish: None,
            scratch: Ptr(at.wrapping_add(at.align_offset(64))),
        };
        // SAFETY: the slices have the elements and are apart; the workspace was just compared with what it must be.
        unsafe { product.run() };
    }
}

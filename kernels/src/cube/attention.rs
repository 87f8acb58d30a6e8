//! Attention and its gradient, by blocks of keys or queries with a running softmax; scores are never stored. A cube has a
//! query, or in the gradient of keys and values a key: first its units have a key or query of the block each, then columns
//! of the head. Sums run in the order of places.

use cubecl::prelude::*;
use dsgc_ir::Op;

use super::index::{Store, element};
use super::reduce::{TOGETHER, With, together};
use super::tokens::{branch, text};
use super::{Launch, MOST_CUBES, math};

/// Sizes of a launch.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
struct Sizes {
    /// Columns of a row of queries.
    queries: u32,
    /// Columns of a row of keys.
    columns: u32,
    /// Heads of queries.
    heads: u32,
    /// Heads of keys.
    key_heads: u32,
    /// Elements of a head.
    width: u32,
    /// How near a key must be; all are if 0.
    window: u32,
    /// On the product of query and key.
    scale: f32,
    /// Number of this launch's first cube.
    first: u32,
}

/// All that a compiled kernel depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Plan {
    causal: bool,
    sloped: bool,
    /// Whether queries are columns of a cache, from a place on that is an operand.
    cached: bool,
    /// Columns of the head that a unit has.
    parts: usize,
    /// How elements of heads are stored; results are in single precision.
    store: Store,
}

/// The lowest score.
const LOWEST: f32 = f32::MIN;

/// [`dsgc_ir::segment::sees`].
#[cube]
fn sees(query: u32, key: u32) -> bool {
    let same_text = text(key) != 0u32 && (text(query) == text(key) || text(query) == 0u32);
    same_text && (branch(key) == 0u32 || branch(key) == branch(query))
}

/// Whether a query sees a key, by columns of the row `b`.
#[cube]
fn visible(segment: &Array<u32>, sizes: &Sizes, b: u32, query: u32, key: u32, #[comptime] causal: bool) -> bool {
    let distance = select(key > query, key - query, query - key);
    let mut seen = sizes.window == 0u32 || distance < sizes.window;
    if comptime!(causal) {
        seen = seen && key <= query;
    }
    let row = b * sizes.columns;
    seen && sees(segment[(row + query) as usize], segment[(row + key) as usize])
}

/// An element of a head.
#[cube]
fn of_head(from: &Array<u32>, at: u32, #[comptime] store: Store) -> f32 {
    f32::reinterpret(element(from, at, store))
}

#[cube]
fn dot(a: &Array<u32>, at: u32, b: &Array<u32>, bt: u32, width: u32, #[comptime] store: Store) -> f32 {
    let mut sum = 0.0f32;
    for i in 0..width {
        sum = fma(of_head(a, at + i, store), of_head(b, bt + i, store), sum);
    }
    sum
}

/// The score of a query and a key.
#[cube]
#[allow(clippy::too_many_arguments)]
fn score(
    q: &Array<u32>,
    k: &Array<u32>,
    slopes: &Array<f32>,
    sizes: &Sizes,
    query_at: u32,
    key_at: u32,
    h: u32,
    query: u32,
    key: u32,
    #[comptime] sloped: bool,
    #[comptime] store: Store,
) -> f32 {
    let product = sizes.scale * dot(q, query_at, k, key_at, sizes.width, store);
    let mut result = product;
    if comptime!(sloped) {
        let distance = select(key > query, key - query, query - key);
        result = product - slopes[h as usize] * f32::cast_from(distance);
    }
    result
}

/// Where the elements of a key's head begin.
#[cube]
fn key_head(sizes: &Sizes, b: u32, column: u32, h: u32) -> u32 {
    ((b * sizes.columns + column) * sizes.key_heads + h) * sizes.width
}

/// Where the elements of a query's head begin.
#[cube]
fn query_head(sizes: &Sizes, b: u32, i: u32, h: u32) -> u32 {
    ((b * sizes.queries + i) * sizes.heads + h) * sizes.width
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn forward(
    q: &Array<u32>,
    k: &Array<u32>,
    v: &Array<u32>,
    segment: &Array<u32>,
    slopes: &Array<f32>,
    place: &Array<u32>,
    out: &mut Array<f32>,
    log_divisor: &mut Array<f32>,
    faults: &mut Array<u32>,
    code: u32,
    sizes: &Sizes,
    #[comptime] plan: Plan,
) {
    let n = CUBE_POS as u32 + sizes.first;
    let i = n % sizes.queries;
    let h = n / sizes.queries % sizes.heads;
    let b = n / sizes.queries / sizes.heads;
    let mut query = i;
    if comptime!(plan.cached) {
        let begin = place[0];
        let most = sizes.columns - sizes.queries;
        if begin > most {
            faults[0] = code;
            faults[1] = begin;
        }
        query = i + min(begin, most);
    }
    let shared = h / (sizes.heads / sizes.key_heads);
    let query_at = query_head(sizes, b, i, h);
    let mut weights = SharedMemory::<f32>::new(comptime!(TOGETHER as usize));
    let mut sums = Array::<f32>::new(plan.parts);
    #[unroll]
    for part in 0..plan.parts {
        sums[part] = 0.0f32;
    }
    let mut most = LOWEST.runtime();
    let mut divisor = 0.0f32;
    let mut end = sizes.columns;
    if comptime!(plan.causal) {
        end = query + 1u32;
    }
    let blocks = end.div_ceil(TOGETHER);
    for block in 0..blocks {
        let key = block * TOGETHER + UNIT_POS;
        let mut own = LOWEST.runtime();
        let mut seen = false;
        if key < end {
            seen = visible(segment, sizes, b, query, key, plan.causal);
        }
        if seen {
            let key_at = key_head(sizes, b, key, shared);
            own = score(q, k, slopes, sizes, query_at, key_at, h, query, key, plan.sloped, plan.store);
        }
        let new_most = max(most, together(own, With::Max));
        let mut weight = 0.0f32;
        if seen {
            weight = math::exp(own - new_most);
        }
        weights[UNIT_POS as usize] = weight;
        let sum = together(weight, With::Sum);
        let shrink = math::exp(most - new_most);
        divisor = divisor * shrink + sum;
        #[unroll]
        for part in 0..plan.parts {
            let i = UNIT_POS + comptime!(part as u32 * TOGETHER);
            if i < sizes.width {
                let mut sum = sums[part] * shrink;
                for j in 0..TOGETHER {
                    let weight = weights[j as usize];
                    // What is not seen may be beyond the row, or NaN.
                    if weight != 0.0f32 {
                        let at = key_head(sizes, b, block * TOGETHER + j, shared) + i;
                        sum = fma(weight, of_head(v, at, plan.store), sum);
                    }
                }
                sums[part] = sum;
            }
        }
        most = new_most;
        sync_cube();
    }
    // By its bits, so that NaN stays NaN.
    let any = u32::reinterpret(divisor) != 0u32;
    #[unroll]
    for part in 0..plan.parts {
        let i = UNIT_POS + comptime!(part as u32 * TOGETHER);
        if i < sizes.width {
            out[(query_at + i) as usize] = select(any, sums[part] / divisor, 0.0f32);
        }
    }
    if comptime!(!plan.cached) && UNIT_POS == 0u32 {
        log_divisor[n as usize] = select(any, most + math::log(divisor), 0.0f32);
    }
}

/// `dq = scale ds k`, with `p = e^(score - log divisor)` and `ds = p (g v - g result)`.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn of_queries(
    q: &Array<u32>,
    k: &Array<u32>,
    v: &Array<u32>,
    segment: &Array<u32>,
    out: &Array<u32>,
    log_divisor: &Array<f32>,
    grad: &Array<u32>,
    slopes: &Array<f32>,
    dq: &mut Array<f32>,
    sizes: &Sizes,
    #[comptime] plan: Plan,
) {
    let n = CUBE_POS as u32 + sizes.first;
    let query = n % sizes.columns;
    let h = n / sizes.columns % sizes.heads;
    let b = n / sizes.columns / sizes.heads;
    let shared = h / (sizes.heads / sizes.key_heads);
    let query_at = query_head(sizes, b, query, h);
    let delta = dot(grad, query_at, out, query_at, sizes.width, plan.store);
    let mut weights = SharedMemory::<f32>::new(comptime!(TOGETHER as usize));
    let mut sums = Array::<f32>::new(plan.parts);
    #[unroll]
    for part in 0..plan.parts {
        sums[part] = 0.0f32;
    }
    let mut end = sizes.columns;
    if comptime!(plan.causal) {
        end = query + 1u32;
    }
    let blocks = end.div_ceil(TOGETHER);
    for block in 0..blocks {
        let key = block * TOGETHER + UNIT_POS;
        let mut ds = 0.0f32;
        let mut seen = false;
        if key < end {
            seen = visible(segment, sizes, b, query, key, plan.causal);
        }
        if seen {
            let key_at = key_head(sizes, b, key, shared);
            let own = score(q, k, slopes, sizes, query_at, key_at, h, query, key, plan.sloped, plan.store);
            let p = math::exp(own - log_divisor[n as usize]);
            ds = sizes.scale * p * (dot(grad, query_at, v, key_at, sizes.width, plan.store) - delta);
        }
        weights[UNIT_POS as usize] = ds;
        sync_cube();
        #[unroll]
        for part in 0..plan.parts {
            let i = UNIT_POS + comptime!(part as u32 * TOGETHER);
            if i < sizes.width {
                let mut sum = sums[part];
                for j in 0..TOGETHER {
                    let weight = weights[j as usize];
                    if weight != 0.0f32 {
                        let at = key_head(sizes, b, block * TOGETHER + j, shared) + i;
                        sum = fma(weight, of_head(k, at, plan.store), sum);
                    }
                }
                sums[part] = sum;
            }
        }
        sync_cube();
    }
    #[unroll]
    for part in 0..plan.parts {
        let i = UNIT_POS + comptime!(part as u32 * TOGETHER);
        if i < sizes.width {
            dq[(query_at + i) as usize] = sums[part];
        }
    }
}

/// `dv = p g` and `dk = scale ds q`, over all queries and all heads that share the key's.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn of_keys(
    q: &Array<u32>,
    k: &Array<u32>,
    v: &Array<u32>,
    segment: &Array<u32>,
    out: &Array<u32>,
    log_divisor: &Array<f32>,
    grad: &Array<u32>,
    slopes: &Array<f32>,
    dk: &mut Array<f32>,
    dv: &mut Array<f32>,
    sizes: &Sizes,
    #[comptime] plan: Plan,
) {
    let n = CUBE_POS as u32 + sizes.first;
    let key = n % sizes.columns;
    let shared = n / sizes.columns % sizes.key_heads;
    let b = n / sizes.columns / sizes.key_heads;
    let key_at = key_head(sizes, b, key, shared);
    let group = sizes.heads / sizes.key_heads;
    let mut weights = SharedMemory::<f32>::new(comptime!(TOGETHER as usize));
    let mut slants = SharedMemory::<f32>::new(comptime!(TOGETHER as usize));
    let mut of_key = Array::<f32>::new(plan.parts);
    let mut of_value = Array::<f32>::new(plan.parts);
    #[unroll]
    for part in 0..plan.parts {
        of_key[part] = 0.0f32;
        of_value[part] = 0.0f32;
    }
    let mut begin = 0u32;
    if comptime!(plan.causal) {
        begin = key / TOGETHER;
    }
    let blocks = sizes.columns.div_ceil(TOGETHER);
    for other in 0..group {
        let h = shared * group + other;
        for block in begin..blocks {
            let query = block * TOGETHER + UNIT_POS;
            let mut p = 0.0f32;
            let mut ds = 0.0f32;
            let mut seen = false;
            if query < sizes.columns {
                seen = visible(segment, sizes, b, query, key, plan.causal);
            }
            if seen {
                let query_at = query_head(sizes, b, query, h);
                let own = score(q, k, slopes, sizes, query_at, key_at, h, query, key, plan.sloped, plan.store);
                p = math::exp(own - log_divisor[((b * sizes.heads + h) * sizes.columns + query) as usize]);
                let delta = dot(grad, query_at, out, query_at, sizes.width, plan.store);
                ds = sizes.scale * p * (dot(grad, query_at, v, key_at, sizes.width, plan.store) - delta);
            }
            weights[UNIT_POS as usize] = p;
            slants[UNIT_POS as usize] = ds;
            sync_cube();
            #[unroll]
            for part in 0..plan.parts {
                let i = UNIT_POS + comptime!(part as u32 * TOGETHER);
                if i < sizes.width {
                    for j in 0..TOGETHER {
                        let weight = weights[j as usize];
                        if weight != 0.0f32 {
                            let at = query_head(sizes, b, block * TOGETHER + j, h) + i;
                            of_value[part] = fma(weight, of_head(grad, at, plan.store), of_value[part]);
                            of_key[part] = fma(slants[j as usize], of_head(q, at, plan.store), of_key[part]);
                        }
                    }
                }
            }
            sync_cube();
        }
    }
    #[unroll]
    for part in 0..plan.parts {
        let i = UNIT_POS + comptime!(part as u32 * TOGETHER);
        if i < sizes.width {
            dk[(key_at + i) as usize] = of_key[part];
            dv[(key_at + i) as usize] = of_value[part];
        }
    }
}

/// How attention looks: over the past only, on what scale, how far.
#[derive(Clone, Copy)]
pub(super) struct Look {
    pub(super) causal: bool,
    pub(super) scale: f64,
    pub(super) window: usize,
}

/// Calls a function for each launch of a number of cubes.
fn launches(cubes: usize, mut launch: impl FnMut(CubeCount, u32)) {
    for first in (0..cubes).step_by(MOST_CUBES) {
        launch(CubeCount::Static((cubes - first).min(MOST_CUBES) as u32, 1, 1), first as u32);
    }
}

fn sizes<R: Runtime>(q: &[usize], k: &[usize], look: Look, first: u32) -> SizesLaunch<R> {
    SizesLaunch::new(
        q[1] as u32,
        k[1] as u32,
        q[2] as u32,
        k[2] as u32,
        q[3] as u32,
        look.window as u32,
        look.scale as f32,
        first,
    )
}

/// Attention, of all columns or of those of a cache from a place on.
pub(super) fn run<R: Runtime>(l: &Launch<R>, look: Look) {
    let (q, k) = (l.shape(l.op.args[0]), l.shape(l.op.args[1]));
    let cached = matches!(l.op.op, Op::CachedAttention { .. });
    let given = if cached { 5 } else { 4 };
    let sloped = l.op.args.len() > given;
    let store = Store::of(l.dtype(l.op.args[0]));
    let plan = Plan { store, causal: look.causal, sloped, cached, parts: q[3].div_ceil(TOGETHER as usize) };
    let cube = CubeDim::new_1d(TOGETHER);
    launches(q[0] * q[1] * q[2], |cubes, first| {
        let slopes = l.arg(if sloped { given } else { 0 });
        // SAFETY: a cube has a query, and reads keys of its row only.
        unsafe {
            forward::launch_unchecked::<R>(
                l.client,
                cubes,
                cube,
                l.arg(0),
                l.arg(1),
                l.arg(2),
                l.arg(3),
                slopes,
                l.arg(if cached { 4 } else { 3 }),
                l.out(0),
                l.out(if cached { 0 } else { 1 }),
                l.faults(),
                l.code,
                sizes(&q, &k, look, first),
                plan,
            );
        }
    });
}

/// The gradients of queries, keys and values.
pub(super) fn gradient<R: Runtime>(l: &Launch<R>, look: Look) {
    let (q, k) = (l.shape(l.op.args[0]), l.shape(l.op.args[1]));
    let sloped = l.op.args.len() > 7;
    let store = Store::of(l.dtype(l.op.args[0]));
    let plan = Plan { store, causal: look.causal, sloped, cached: false, parts: q[3].div_ceil(TOGETHER as usize) };
    let cube = CubeDim::new_1d(TOGETHER);
    let slopes = if sloped { 7 } else { 0 };
    launches(q[0] * q[1] * q[2], |cubes, first| {
        // SAFETY: a cube has a query, and reads keys of its row only.
        unsafe {
            of_queries::launch_unchecked::<R>(
                l.client,
                cubes,
                cube,
                l.arg(0),
                l.arg(1),
                l.arg(2),
                l.arg(3),
                l.arg(4),
                l.arg(5),
                l.arg(6),
                l.arg(slopes),
                l.out(0),
                sizes(&q, &k, look, first),
                plan,
            );
        }
    });
    launches(k[0] * k[1] * k[2], |cubes, first| {
        // SAFETY: a cube has a key, and reads queries of its row only.
        unsafe {
            of_keys::launch_unchecked::<R>(
                l.client,
                cubes,
                cube,
                l.arg(0),
                l.arg(1),
                l.arg(2),
                l.arg(3),
                l.arg(4),
                l.arg(5),
                l.arg(6),
                l.arg(slopes),
                l.out(1),
                l.out(2),
                sizes(&q, &k, look, first),
                plan,
            );
        }
    });
}

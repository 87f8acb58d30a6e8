//! The dynamic loss scale of roles that compute in fp16 (Micikevicius et al. 2018), by graph ops and states.
//!
//! Small gradients vanish in fp16, so the loss is differentiated times a power of two, which the optimizer takes out of
//! the gradients again before it clips them. Where one of them is not finite, nothing is updated. The rule of
//! DeepSpeed with its defaults: the scale begins as 2^16; the first overflow is forgiven, every further one halves it, down to 1;
//! after 1000 steps without an overflow it doubles, and one more is forgiven.
//!
//! Roles that step together (`align_overflow`) are skipped together; the scale of one whose own gradients were finite
//! stays as it was, and so does its count of steps.
//!
//! States are zero at first, so the scale is kept as a distance: `loss_scale/<role>` is the exponent minus 16.

use dsgc_ir::diag::Span;
use dsgc_ir::{Builder, DType, Op, Program, StateId, StateKind, Type, Value};

/// Name of the output with the loss scale of a step, `f32[]`.
pub const LOSS_SCALE: &str = "loss_scale";
/// Name of the output that is 1 where a step was skipped, `f32[]`.
pub const OVERFLOW: &str = "overflow";

/// The exponent of the first scale.
const FIRST: i32 = 16;
/// Steps without an overflow after which the scale doubles.
const WINDOW: i32 = 1000;

/// The states of a role's loss scale, all `i32[]`.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    /// The exponent of the scale, minus that of the first.
    exponent: StateId,
    /// Steps since the last overflow or doubling.
    clean: StateId,
    /// 1 where an overflow has been forgiven since the last doubling.
    forgiven: StateId,
}

impl Scale {
    /// That of a role, if it computes in fp16; declared when first asked for.
    pub fn of(program: &mut Program, role: &str) -> Option<Scale> {
        Scale::belongs_to(program, role).then(|| {
            let [exponent, clean, forgiven] = ["", ".clean", ".forgiven"].map(|suffix| {
                let name = format!("loss_scale/{role}{suffix}");
                let declared = program.state_named(&name);
                declared
                    .unwrap_or_else(|| program.declare(name, Type::scalar(DType::I32), StateKind::State, Span::NONE))
            });
            Scale { exponent, clean, forgiven }
        })
    }

    /// Whether a role has one.
    pub fn belongs_to(program: &Program, role: &str) -> bool {
        program.stage.roles.iter().any(|r| r.name == role && r.precision == Some(DType::F16))
    }

    /// The scale, `f32[]`.
    pub fn value(self, b: &mut Builder) -> Value {
        let (moved, first) = (read(b, self.exponent), whole(b, FIRST));
        let exponent = b.one(Op::Add {}, &[moved, first]);
        let exponent = b.cast(exponent, DType::F32);
        let two = b.fill(2.0, &[]);
        b.one(Op::Pow {}, &[two, exponent])
    }

    /// Writes what the states are after a step whose gradients were finite or not. Where `skipped` is given and true, others'
    /// were not, and finite ones change nothing.
    pub fn renew(self, b: &mut Builder, finite: Value, skipped: Option<Value>) {
        let [exponent, clean, forgiven] = [self.exponent, self.clean, self.forgiven].map(|state| read(b, state));
        let (zero, one) = (whole(b, 0), whole(b, 1));
        let more = b.one(Op::Add {}, &[clean, one]);
        let window = whole(b, WINDOW);
        let full = b.one(Op::Eq {}, &[more, window]);
        let grows = b.one(Op::And {}, &[finite, full]);
        let again = b.one(Op::Where {}, &[full, zero, more]);
        let new_clean = b.one(Op::Where {}, &[finite, again, zero]);
        // Without an overflow it stays as it is until the scale doubles.
        let kept = b.one(Op::Where {}, &[grows, zero, forgiven]);
        let new_forgiven = b.one(Op::Where {}, &[finite, kept, one]);
        let up = b.one(Op::Cast { dtype: DType::I32 }, &[grows]);
        let up = b.one(Op::Add {}, &[exponent, up]);
        let down = b.one(Op::Sub {}, &[exponent, forgiven]);
        let least = whole(b, -FIRST);
        let down = b.one(Op::Max {}, &[down, least]);
        let new_exponent = b.one(Op::Where {}, &[finite, up, down]);
        let new = [
            (self.exponent, exponent, new_exponent),
            (self.clean, clean, new_clean),
            (self.forgiven, forgiven, new_forgiven),
        ];
        let stays = skipped.map(|skipped| b.one(Op::And {}, &[finite, skipped]));
        for (state, old, new) in new {
            let new = stays.map_or(new, |stays| b.one(Op::Where {}, &[stays, old, new]));
            b.write(state, &Type::scalar(DType::I32), new);
        }
    }
}

fn read(b: &mut Builder, state: StateId) -> Value {
    b.read(state, &Type::scalar(DType::I32))
}

fn whole(b: &mut Builder, value: i32) -> Value {
    b.one(Op::Const { value: f64::from(value), dtype: DType::I32 }, &[])
}

/// What the gradient of a loss begins with: a factor on it, times the role's scale.
pub fn seed(b: &mut Builder, scale: Option<Scale>, factor: f64) -> Value {
    let factor = b.fill(factor, &[]);
    match scale {
        Some(scale) => {
            let scale = scale.value(b);
            b.one(Op::Mul {}, &[factor, scale])
        }
        None => factor,
    }
}

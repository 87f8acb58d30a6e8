//! Loops compiled by Cranelift: the arithmetic of a stage on four elements at a time.
//!
//! Floats and integers are vectors of four lanes, truth values masks of all ones or zeros; bf16 are floats whose lower
//! halves are zeros. Every instruction rounds as the kernel of its op does, so results are the same bits. Cranelift asks the machine which instructions it has.

use std::sync::OnceLock;

use cranelift_codegen::ir::condcodes::{FloatCC, IntCC};
use cranelift_codegen::ir::types::{F32X4, I8X16, I16X8, I32, I32X4, I64, I64X2};
use cranelift_codegen::ir::{AbiParam, Endianness, InstBuilder, MemFlagsData, Type, UserFuncName, Value};
use cranelift_codegen::isa::OwnedTargetIsa;
use cranelift_codegen::settings::{self, Configurable};
use cranelift_frontend::{FunctionBuilder, FunctionBuilderContext};
use cranelift_jit::{JITBuilder, JITModule};
use cranelift_module::{Linkage, Module, default_libcall_names};
use dsgc_ir::{Body, DType, Op};

use super::plan::{Home, Plan, step_args};

/// Elements that the code works on at a time.
pub(super) const LANES: usize = 4;

/// A compiled loop. It stays in memory until the program ends.
///
/// Arguments are the address of a table with the address of every value of the body that lies in memory, and how many
/// elements there are, a multiple of [`LANES`].
pub(super) type Code = unsafe extern "C" fn(*const *mut u8, usize);

/// Whether this machine has a compiler.
pub(super) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| cfg!(target_pointer_width = "64") && cfg!(target_endian = "little") && isa().is_ok())
}

fn isa() -> Result<OwnedTargetIsa, String> {
    let mut flags = settings::builder();
    for (name, value) in [("opt_level", "speed"), ("is_pic", "false"), ("use_colocated_libcalls", "false")] {
        flags.set(name, value).map_err(|e| e.to_string())?;
    }
    cranelift_native::builder()?.finish(settings::Flags::new(flags)).map_err(|e| e.to_string())
}

/// Compiles loops: for each a body with its plan, and the values that it computes.
pub(super) fn compile(loops: &[(&Body, &Plan, &[usize])]) -> Vec<Code> {
    try_compile(loops).unwrap_or_else(|why| panic!("bug: a region does not compile: {why}"))
}

fn try_compile(loops: &[(&Body, &Plan, &[usize])]) -> Result<Vec<Code>, String> {
    if loops.is_empty() {
        return Ok(vec![]);
    }
    // What a module has compiled stays when the module is dropped: only `free_memory` would end it.
    let mut module = JITModule::new(JITBuilder::with_isa(isa()?, default_libcall_names()));
    let mut context = module.make_context();
    let mut reused = FunctionBuilderContext::new();
    let mut ids = Vec::new();
    for (i, (body, plan, values)) in loops.iter().enumerate() {
        let mut signature = module.make_signature();
        signature.params = vec![AbiParam::new(I64), AbiParam::new(I64)];
        let declared = module.declare_function(&format!("region_{i}"), Linkage::Local, &signature);
        let id = declared.map_err(|e| e.to_string())?;
        context.func.signature = signature;
        context.func.name = UserFuncName::user(0, id.as_u32());
        let mut b = FunctionBuilder::new(&mut context.func, &mut reused);
        Emit { body, plan, b: &mut b, values: vec![None; plan.dtypes.len()] }.function(values);
        b.finalize(module.target_config());
        module.define_function(id, &mut context).map_err(|e| format!("{e:?}"))?;
        module.clear_context(&mut context);
        ids.push(id);
    }
    module.finalize_definitions().map_err(|e| e.to_string())?;
    let code = ids.into_iter().map(|id| {
        // SAFETY: the function was declared with these parameters and the machine's calling convention.
        unsafe { std::mem::transmute::<*const u8, Code>(module.get_finalized_function(id)) }
    });
    Ok(code.collect())
}

/// The function that is being written.
struct Emit<'a, 'b, 'c> {
    body: &'a Body,
    plan: &'a Plan,
    b: &'b mut FunctionBuilder<'c>,
    /// What is in a register now, by value of the body.
    values: Vec<Option<Value>>,
}

impl Emit<'_, '_, '_> {
    fn function(mut self, computed: &[usize]) {
        let entry = self.b.create_block();
        let (head, inner, exit) = (self.b.create_block(), self.b.create_block(), self.b.create_block());
        self.b.append_block_params_for_function_params(entry);
        self.b.switch_to_block(entry);
        let (table, n) = (self.b.block_params(entry)[0], self.b.block_params(entry)[1]);
        let mut loaded: Vec<usize> = Vec::new();
        for &arg in computed.iter().flat_map(|&v| step_args(self.body, v)) {
            if let Some(constant) = self.constant(arg) {
                self.values[arg] = Some(constant);
            } else if !computed.contains(&arg) && !loaded.contains(&arg) {
                loaded.push(arg);
            }
        }
        let stored: Vec<usize> = computed.iter().copied().filter(|&v| self.plan.homes[v] != Home::Nowhere).collect();
        let address = |b: &mut FunctionBuilder, value: usize| {
            b.ins().load(I64, MemFlagsData::trusted(), table, (value * size_of::<usize>()) as i32)
        };
        let from: Vec<Value> = loaded.iter().map(|&v| address(self.b, v)).collect();
        let to: Vec<Value> = stored.iter().map(|&v| address(self.b, v)).collect();
        let zero = self.b.ins().iconst(I64, 0);
        self.b.ins().jump(head, &[zero.into()]);

        self.b.switch_to_block(head);
        let i = self.b.append_block_param(head, I64);
        let more = self.b.ins().icmp(IntCC::UnsignedLessThan, i, n);
        self.b.ins().brif(more, inner, &[], exit, &[]);

        self.b.switch_to_block(inner);
        for (&value, &base) in loaded.iter().zip(&from) {
            let at = self.place(value, base, i);
            self.values[value] = Some(self.load(self.plan.dtypes[value], at));
        }
        for &value in computed {
            self.values[value] = Some(self.step(value));
        }
        for (&value, &base) in stored.iter().zip(&to) {
            let at = self.place(value, base, i);
            self.store(value, at);
        }
        let next = self.b.ins().iadd_imm_u(i, LANES as i64);
        self.b.ins().jump(head, &[next.into()]);

        self.b.switch_to_block(exit);
        self.b.ins().return_(&[]);
        self.b.seal_all_blocks();
    }

    /// The address of element `i`.
    fn place(&mut self, value: usize, base: Value, i: Value) -> Value {
        let offset = match self.plan.dtypes[value].bytes() {
            1 => i,
            2 => self.b.ins().ishl_imm_u(i, 1),
            _ => self.b.ins().ishl_imm_u(i, 2),
        };
        self.b.ins().iadd(base, offset)
    }

    /// Four lanes of a constant, if the value is one.
    fn constant(&mut self, value: usize) -> Option<Value> {
        let step = &self.body.steps()[value.checked_sub(self.body.operands())?];
        let Op::Const { value, dtype } = step.op else { return None };
        Some(match dtype {
            DType::F32 | DType::Bf16 => self.float(dtype.round(value as f32)),
            DType::I32 => self.integer(value as i32),
            DType::Bool => self.integer(if value != 0.0 { -1 } else { 0 }),
            DType::F16 | DType::Quantized(_) | DType::Key => panic!("bug: a constant {dtype} in code"),
        })
    }

    fn float(&mut self, x: f32) -> Value {
        let scalar = self.b.ins().f32const(x);
        self.b.ins().splat(F32X4, scalar)
    }

    fn integer(&mut self, x: i32) -> Value {
        let scalar = self.b.ins().iconst(I32, i64::from(x as u32));
        self.b.ins().splat(I32X4, scalar)
    }

    /// The same bits as lanes of another type.
    fn bits(&mut self, ty: Type, x: Value) -> Value {
        self.b.ins().bitcast(ty, MemFlagsData::new().with_endianness(Endianness::Little), x)
    }

    fn load(&mut self, dtype: DType, at: Value) -> Value {
        let flags = MemFlagsData::new().with_notrap();
        match dtype {
            DType::F32 => self.b.ins().load(F32X4, flags, at, 0),
            DType::I32 => self.b.ins().load(I32X4, flags, at, 0),
            // Four bytes of 0 or 1 become four masks.
            DType::Bool => {
                let bytes = self.b.ins().load(I32, flags, at, 0);
                let bytes = self.b.ins().scalar_to_vector(I32X4, bytes);
                let bytes = self.bits(I8X16, bytes);
                let halves = self.b.ins().uwiden_low(bytes);
                let lanes = self.b.ins().uwiden_low(halves);
                let zero = self.integer(0);
                self.b.ins().icmp(IntCC::NotEqual, lanes, zero)
            }
            DType::Bf16 => {
                let halves = self.b.ins().load(I64, flags, at, 0);
                let halves = self.b.ins().scalar_to_vector(I64X2, halves);
                let halves = self.bits(I16X8, halves);
                let lanes = self.b.ins().uwiden_low(halves);
                let lanes = self.b.ins().ishl_imm_u(lanes, 16);
                self.bits(F32X4, lanes)
            }
            DType::F16 | DType::Quantized(_) | DType::Key => panic!("bug: {dtype} in code"),
        }
    }

    /// Floats of which bf16 holds each, next to `x`: the formula of the kernel.
    fn round(&mut self, x: Value) -> Value {
        let bits = self.bits(I32X4, x);
        let (half, one) = (self.integer(0x7FFF), self.integer(1));
        let (quiet, upper) = (self.integer(0x0040_0000), self.integer(0xFFFF_0000_u32 as i32));
        let lowest = self.b.ins().ushr_imm_u(bits, 16);
        let odd = self.b.ins().band(lowest, one);
        let more = self.b.ins().iadd(half, odd);
        let rounded = self.b.ins().iadd(bits, more);
        let nan = self.b.ins().bor(bits, quiet);
        let is_nan = self.b.ins().fcmp(FloatCC::Unordered, x, x);
        let bits = self.b.ins().bitselect(is_nan, nan, rounded);
        let bits = self.b.ins().band(bits, upper);
        self.bits(F32X4, bits)
    }

    fn store(&mut self, value: usize, at: Value) {
        let flags = MemFlagsData::new().with_notrap();
        let mut x = self.get(value);
        if self.plan.dtypes[value] == DType::Bool {
            let one = self.integer(1);
            let lanes = self.b.ins().band(x, one);
            let halves = self.b.ins().snarrow(lanes, lanes);
            let bytes = self.b.ins().unarrow(halves, halves);
            let bytes = self.bits(I32X4, bytes);
            x = self.b.ins().extractlane(bytes, 0);
        }
        if self.plan.dtypes[value] == DType::Bf16 {
            let lanes = self.bits(I32X4, x);
            let lanes = self.b.ins().sshr_imm_u(lanes, 16);
            let halves = self.b.ins().snarrow(lanes, lanes);
            let halves = self.bits(I64X2, halves);
            x = self.b.ins().extractlane(halves, 0);
        }
        self.b.ins().store(flags, x, at, 0);
    }

    fn get(&self, value: usize) -> Value {
        self.values[value].unwrap_or_else(|| panic!("bug: ${value} of {} is not there yet", self.body))
    }

    /// `a` where the mask is ones, else `b`.
    fn choose(&mut self, mask: Value, a: Value, b: Value) -> Value {
        let ty = self.b.func.dfg.value_type(a);
        let mask = if ty == I32X4 { mask } else { self.bits(ty, mask) };
        self.b.ins().bitselect(mask, a, b)
    }

    /// `a` where it compares like this with `b` or is no number, else `b`: the formulas of the kernels.
    fn bound(&mut self, holds: FloatCC, a: Value, b: Value) -> Value {
        let holds = self.b.ins().fcmp(holds, a, b);
        let nan = self.b.ins().fcmp(FloatCC::Unordered, a, a);
        let first = self.b.ins().bor(holds, nan);
        self.choose(first, a, b)
    }

    fn step(&mut self, value: usize) -> Value {
        let x = self.exact(value);
        if self.plan.dtypes[value] == DType::Bf16 { self.round(x) } else { x }
    }

    /// What a step gives before it is rounded to its type.
    fn exact(&mut self, value: usize) -> Value {
        let step = &self.body.steps()[value - self.body.operands()];
        let args: Vec<Value> = step.args.iter().map(|&a| self.get(a)).collect();
        let (x, y) = (args[0], *args.get(1).unwrap_or(&args[0]));
        match (&step.op, self.plan.dtypes[step.args[0]]) {
            (Op::Where {}, _) => self.choose(x, y, args[2]),
            (Op::Cast { dtype }, from) => self.cast(x, from, *dtype),
            (op, DType::F32 | DType::Bf16) => self.floats(op, x, y),
            (op, DType::I32) => self.integers(op, x, y),
            (Op::And {}, _) => self.b.ins().band(x, y),
            (Op::Or {}, _) => self.b.ins().bor(x, y),
            (Op::Ne {}, _) => self.b.ins().bxor(x, y),
            (Op::Not {}, _) => self.b.ins().bnot(x),
            (Op::Eq {}, _) => {
                let differ = self.b.ins().bxor(x, y);
                self.b.ins().bnot(differ)
            }
            (op, dtype) => panic!("bug: `{op}` of {dtype} has no code"),
        }
    }

    fn cast(&mut self, x: Value, from: DType, to: DType) -> Value {
        let wide = |dtype| if dtype == DType::Bf16 { DType::F32 } else { dtype };
        match (wide(from), wide(to)) {
            (DType::F32, DType::I32) => self.b.ins().fcvt_to_sint_sat(I32X4, x),
            (DType::F32, DType::Bool) => {
                let zero = self.float(0.0);
                self.b.ins().fcmp(FloatCC::NotEqual, x, zero)
            }
            (DType::I32, DType::F32) => self.b.ins().fcvt_from_sint(F32X4, x),
            (DType::I32, DType::Bool) => {
                let zero = self.integer(0);
                self.b.ins().icmp(IntCC::NotEqual, x, zero)
            }
            (DType::Bool, DType::F32) => {
                let one = self.integer(1.0f32.to_bits() as i32);
                let lanes = self.b.ins().band(x, one);
                self.bits(F32X4, lanes)
            }
            (DType::Bool, DType::I32) => {
                let one = self.integer(1);
                self.b.ins().band(x, one)
            }
            (from, to) if from == to => x,
            (from, to) => panic!("bug: a cast from {from} to {to}"),
        }
    }

    fn floats(&mut self, op: &Op, x: Value, y: Value) -> Value {
        match op {
            Op::Add {} => self.b.ins().fadd(x, y),
            Op::Sub {} => self.b.ins().fsub(x, y),
            Op::Mul {} => self.b.ins().fmul(x, y),
            Op::Div {} => self.b.ins().fdiv(x, y),
            Op::Max {} => self.bound(FloatCC::GreaterThan, x, y),
            Op::Min {} => self.bound(FloatCC::LessThan, x, y),
            Op::Relu {} => {
                let zero = self.float(0.0);
                self.bound(FloatCC::GreaterThan, x, zero)
            }
            Op::Neg {} => self.b.ins().fneg(x),
            Op::Abs {} => self.b.ins().fabs(x),
            Op::Sqrt {} => self.b.ins().sqrt(x),
            Op::Eq {} => self.b.ins().fcmp(FloatCC::Equal, x, y),
            Op::Ne {} => self.b.ins().fcmp(FloatCC::NotEqual, x, y),
            Op::Lt {} => self.b.ins().fcmp(FloatCC::LessThan, x, y),
            Op::Le {} => self.b.ins().fcmp(FloatCC::LessThanOrEqual, x, y),
            other => panic!("bug: `{other}` of floats has no code"),
        }
    }

    fn integers(&mut self, op: &Op, x: Value, y: Value) -> Value {
        match op {
            Op::Add {} => self.b.ins().iadd(x, y),
            Op::Sub {} => self.b.ins().isub(x, y),
            Op::Mul {} => self.b.ins().imul(x, y),
            Op::Max {} => self.b.ins().smax(x, y),
            Op::Min {} => self.b.ins().smin(x, y),
            Op::Neg {} => self.b.ins().ineg(x),
            Op::Abs {} => self.b.ins().iabs(x),
            Op::Eq {} => self.b.ins().icmp(IntCC::Equal, x, y),
            Op::Ne {} => self.b.ins().icmp(IntCC::NotEqual, x, y),
            Op::Lt {} => self.b.ins().icmp(IntCC::SignedLessThan, x, y),
            Op::Le {} => self.b.ins().icmp(IntCC::SignedLessThanOrEqual, x, y),
            other => panic!("bug: `{other}` of integers has no code"),
        }
    }
}

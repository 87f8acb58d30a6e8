//! Tokens to a tree, by precedence climbing. The first error of an expression ends its reading.

use dsgc_ir::diag::{Diag, Span};

use super::lex::{Kind, Token, lex};
use super::{Arg, BinaryOp, Expr, ExprKind, Item, UnaryOp, Word};
use crate::node::FLOW_HELP;
use crate::text::{Style, Text};

/// Brackets in brackets; a bound, because deeper ones would end in a stack overflow instead of a message.
const MAX_DEPTH: usize = 100;
/// Tokens of one expression; a bound for the same reason: `1 + 1 + 1 ...` nests to the left.
const MAX_TOKENS: usize = 2000;

/// Words that cannot be names.
const WORDS: &[&str] = &["and", "or", "not", "if", "else", "true", "false", "none", "None", "True", "False"];

pub(super) fn parse(text: &Text) -> Result<Expr, Diag> {
    let tokens = lex(text)?;
    if tokens.len() > MAX_TOKENS {
        return Err(Diag::error(format!(
            "found {} tokens in one expression, expected {MAX_TOKENS} at most",
            tokens.len()
        ))
        .label(text.span, "")
        .help("split it into several `let` entries"));
    }
    let mut parser = Parser { text, tokens, next: 0, depth: 0 };
    let expr = parser.expr()?;
    match parser.kind() {
        Kind::End => Ok(expr),
        Kind::Sign(close @ (")" | "]")) => {
            let diag = Diag::error(format!("found `{close}`, which closes nothing")).label(parser.here(), "");
            Err(parser.flow_help(diag))
        }
        Kind::Sign("=") => Err(Diag::error("found `=`, which is not an operator")
            .label(parser.here(), "")
            .help("write `==` to compare; a value gets its name as a YAML key: `name: expression`")),
        Kind::Sign(".") => Err(parser.unexpected("an operator")),
        _ => Err(parser.unexpected("an operator or the end of the expression")),
    }
}

struct Parser<'a> {
    text: &'a Text,
    /// Ends with `End`, which is never passed.
    tokens: Vec<Token>,
    next: usize,
    depth: usize,
}

impl Parser<'_> {
    fn kind(&self) -> &Kind {
        self.tokens.get(self.next).map_or(&Kind::End, |t| &t.kind)
    }

    fn here(&self) -> Span {
        match self.tokens.get(self.next) {
            Some(t) => self.text.span_of(t.at, t.len),
            None => self.text.span,
        }
    }

    /// From the token at `first` up to the one before the next.
    fn span_from(&self, first: usize) -> Span {
        match (self.tokens.get(first), self.tokens.get(self.next.saturating_sub(1))) {
            (Some(a), Some(b)) => self.text.span_of(a.at, (b.at + b.len).saturating_sub(a.at)),
            _ => self.text.span,
        }
    }

    fn expr_from(&self, first: usize, kind: ExprKind) -> Expr {
        Expr { span: self.span_from(first), kind }
    }

    fn take(&mut self, sign: &str) -> bool {
        let found = matches!(self.kind(), Kind::Sign(s) if *s == sign);
        self.next += usize::from(found);
        found
    }

    fn take_word(&mut self, word: &str) -> bool {
        let found = matches!(self.kind(), Kind::Word(w) if w == word);
        self.next += usize::from(found);
        found
    }

    fn flow_help(&self, diag: Diag) -> Diag {
        if self.text.flow && self.text.style == Style::Plain { diag.help(FLOW_HELP) } else { diag }
    }

    fn unexpected(&self, wanted: &str) -> Diag {
        let found = match self.kind() {
            Kind::End if self.tokens.len() == 1 => "an empty text".into(),
            Kind::End => "the end of the expression".into(),
            _ => {
                let token = &self.tokens[self.next];
                let text: String = self.text.text.chars().skip(token.at).take(token.len).collect();
                format!("`{text}`")
            }
        };
        Diag::error(format!("found {found}, expected {wanted}")).label(self.here(), "")
    }

    /// Expects the bracket that closes the one at token `open`.
    fn close(&mut self, open: usize, sign: &'static str, wanted: &str) -> Result<(), Diag> {
        if self.take(sign) {
            return Ok(());
        }
        let opened = self.tokens.get(open).map_or(self.text.span, |t| self.text.span_of(t.at, t.len));
        let opener = if sign == ")" { "(" } else { "[" };
        match self.kind() {
            Kind::End => Err(self.flow_help(Diag::error(format!("`{opener}` is not closed")).label(opened, ""))),
            Kind::Sign(other @ (")" | "]")) => Err(Diag::error(format!("found `{other}`, expected `{sign}`"))
                .label(self.here(), "")
                .label(opened, "opened here")),
            Kind::Sign("=") => Err(self.unexpected(wanted).help("write `==` to compare")),
            _ => Err(self.unexpected(wanted)),
        }
    }

    fn deeper<T>(&mut self, inner: impl FnOnce(&mut Self) -> Result<T, Diag>) -> Result<T, Diag> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(Diag::error(format!("found more than {MAX_DEPTH} levels in one expression"))
                .label(self.here(), "")
                .help("split it into several `let` entries"));
        }
        let result = inner(self);
        self.depth -= 1;
        result
    }

    fn expr(&mut self) -> Result<Expr, Diag> {
        self.deeper(|p| {
            let first = p.next;
            let then = p.binary(0)?;
            if !p.take_word("if") {
                return Ok(then);
            }
            let condition = p.binary(0)?;
            if !p.take_word("else") {
                return Err(p.unexpected("`else`").help("write `a if condition else b`"));
            }
            let otherwise = p.expr()?;
            let kind =
                ExprKind::If { condition: Box::new(condition), then: Box::new(then), otherwise: Box::new(otherwise) };
            Ok(p.expr_from(first, kind))
        })
    }

    fn binary_op(&self) -> Option<(BinaryOp, u8)> {
        Some(match self.kind() {
            Kind::Word(w) if w == "or" => (BinaryOp::Or, 1),
            Kind::Word(w) if w == "and" => (BinaryOp::And, 2),
            Kind::Sign("==") => (BinaryOp::Eq, COMPARISON),
            Kind::Sign("!=") => (BinaryOp::Ne, COMPARISON),
            Kind::Sign("<") => (BinaryOp::Lt, COMPARISON),
            Kind::Sign("<=") => (BinaryOp::Le, COMPARISON),
            Kind::Sign(">") => (BinaryOp::Gt, COMPARISON),
            Kind::Sign(">=") => (BinaryOp::Ge, COMPARISON),
            Kind::Sign("+") => (BinaryOp::Add, 5),
            Kind::Sign("-") => (BinaryOp::Sub, 5),
            Kind::Sign("*") => (BinaryOp::Mul, 6),
            Kind::Sign("/") => (BinaryOp::Div, 6),
            _ => return None,
        })
    }

    /// Operators that bind tighter than `above`, all of them grouping to the left.
    fn binary(&mut self, above: u8) -> Result<Expr, Diag> {
        let first = self.next;
        let mut left = if above < COMPARISON { self.negation()? } else { self.unary()? };
        let mut compared = false;
        while let Some((op, level)) = self.binary_op() {
            if level <= above {
                break;
            }
            if level == COMPARISON && compared {
                return Err(Diag::error("found a comparison of a comparison")
                    .label(self.here(), "")
                    .help("write `a < b and b < c`, or parentheses"));
            }
            self.next += 1;
            compared = level == COMPARISON;
            let right = self.binary(level)?;
            left = self.expr_from(first, ExprKind::Binary(op, Box::new(left), Box::new(right)));
        }
        Ok(left)
    }

    fn negation(&mut self) -> Result<Expr, Diag> {
        let first = self.next;
        if !self.take_word("not") {
            return self.unary();
        }
        // `not` binds looser than comparisons: `not a == b` is `not (a == b)`.
        let inner = self.deeper(|p| {
            if matches!(p.kind(), Kind::Word(w) if w == "not") { p.negation() } else { p.binary(COMPARISON - 1) }
        })?;
        Ok(self.expr_from(first, ExprKind::Unary(UnaryOp::Not, Box::new(inner))))
    }

    fn unary(&mut self) -> Result<Expr, Diag> {
        let first = self.next;
        if self.take("-") {
            let inner = self.deeper(Self::unary)?;
            return Ok(self.expr_from(first, ExprKind::Unary(UnaryOp::Neg, Box::new(inner))));
        }
        let base = self.postfix()?;
        if self.take("**") {
            // To the right, and tighter than a minus before it: `-x ** -2 ** y`.
            let power = self.deeper(Self::unary)?;
            return Ok(self.expr_from(first, ExprKind::Binary(BinaryOp::Pow, Box::new(base), Box::new(power))));
        }
        Ok(base)
    }

    fn postfix(&mut self) -> Result<Expr, Diag> {
        let first = self.next;
        let mut base = self.primary()?;
        loop {
            let open = self.next;
            if self.take("(") {
                let ExprKind::Name(name) = base.kind else {
                    return Err(Diag::error("found a call of a value, expected a function's name")
                        .label(base.span, "this is a value"));
                };
                let args = self.deeper(|p| p.args(open))?;
                let function = Word { span: base.span, text: name };
                base = self.expr_from(first, ExprKind::Call { function, args });
            } else if self.take("[") {
                let items = self.deeper(|p| p.items(open))?;
                base = self.expr_from(first, ExprKind::Index { base: Box::new(base), items });
            } else if self.take(".") {
                let span = self.here();
                let Kind::Word(name) = self.kind().clone() else {
                    return Err(self.unexpected("a name after the dot"));
                };
                self.next += 1;
                // `x .y` is `x.y`, so that a plain name is always one.
                base = match base.kind {
                    ExprKind::Name(before) => self.expr_from(first, ExprKind::Name(format!("{before}.{name}"))),
                    _ => self.expr_from(first, ExprKind::Member(Box::new(base), Word { span, text: name })),
                };
            } else {
                return Ok(base);
            }
        }
    }

    fn args(&mut self, open: usize) -> Result<Vec<Arg>, Diag> {
        let mut args: Vec<Arg> = Vec::new();
        while !self.take(")") {
            let first = self.here();
            let named = matches!(self.tokens.get(self.next + 1), Some(Token { kind: Kind::Sign("="), .. }));
            let name = match self.kind().clone() {
                Kind::Word(text) if named && !WORDS.contains(&text.as_str()) => {
                    self.next += 2;
                    Some(Word { span: first, text })
                }
                _ => None,
            };
            if let (None, Some(before)) = (&name, args.iter().rev().find_map(|a| a.name.as_ref()))
                && *self.kind() != Kind::End
            {
                return Err(Diag::error("found an argument without a name after one with a name")
                    .label(first, "")
                    .label(before.span, "the one with a name"));
            }
            if let Some(name) = &name
                && let Some(before) = args.iter().filter_map(|a| a.name.as_ref()).find(|n| n.text == name.text)
            {
                return Err(Diag::error(format!("found the argument `{}` twice", name.text))
                    .label(name.span, "again here")
                    .label(before.span, "first here"));
            }
            if *self.kind() == Kind::End {
                return Err(self.close(open, ")", "an argument").err().unwrap_or_else(|| self.unexpected("`)`")));
            }
            let value = self.expr()?;
            args.push(Arg { name, value });
            if !self.take(",") {
                self.close(open, ")", "`,` or `)`")?;
                break;
            }
        }
        Ok(args)
    }

    fn items(&mut self, open: usize) -> Result<Vec<Item>, Diag> {
        let mut items = Vec::new();
        while !self.take("]") {
            let span = self.here();
            if *self.kind() == Kind::End {
                self.close(open, "]", "an index")?;
            } else if self.take("...") {
                items.push(Item::Rest(span));
            } else if self.take_word("None") {
                items.push(Item::New(span));
            } else {
                let start = if matches!(self.kind(), Kind::Sign(":")) { None } else { Some(self.expr()?) };
                let colon = self.here();
                if !self.take(":") {
                    // Without a colon there was an expression.
                    items.extend(start.map(Item::At));
                } else {
                    let ends = matches!(self.kind(), Kind::Sign("," | "]") | Kind::End);
                    let stop = if ends { None } else { Some(self.expr()?) };
                    if matches!(self.kind(), Kind::Sign(":")) {
                        return Err(Diag::error("found a second `:`, expected `,` or `]`")
                            .label(self.here(), "")
                            .help("slices have no step"));
                    }
                    items.push(Item::Slice { start, stop, span: colon });
                }
            }
            if !self.take(",") {
                self.close(open, "]", "`,`, `:` or `]`")?;
                break;
            }
        }
        Ok(items)
    }

    fn primary(&mut self) -> Result<Expr, Diag> {
        let first = self.next;
        let kind = match self.kind().clone() {
            Kind::Int(n) => ExprKind::Int(n),
            Kind::Float(x) => ExprKind::Float(x),
            Kind::Str(s) => ExprKind::Str(s),
            Kind::Word(w) => match w.as_str() {
                "true" => ExprKind::Bool(true),
                "false" => ExprKind::Bool(false),
                "none" => ExprKind::None,
                "True" | "False" => {
                    return Err(self.unexpected("an expression").help(format!("write `{}`", w.to_lowercase())));
                }
                "None" => {
                    let help = "`None` stands in brackets, for a new dimension: `x[:, None]`; no value is `none`";
                    return Err(self.unexpected("an expression").help(help));
                }
                word if WORDS.contains(&word) => return Err(self.unexpected("an expression")),
                _ => ExprKind::Name(w),
            },
            Kind::Sign("(") => {
                self.next += 1;
                let mut inner = self.expr()?;
                self.close(first, ")", "an operator or `)`")?;
                inner.span = self.span_from(first);
                return Ok(inner);
            }
            Kind::Sign("[") => {
                self.next += 1;
                let mut items = Vec::new();
                while !self.take("]") {
                    if *self.kind() == Kind::End {
                        self.close(first, "]", "an item")?;
                    }
                    items.push(self.expr()?);
                    if !self.take(",") {
                        self.close(first, "]", "`,` or `]`")?;
                        break;
                    }
                }
                return Ok(self.expr_from(first, ExprKind::List(items)));
            }
            Kind::Sign("=") => return Err(self.unexpected("an expression").help("write `==` to compare")),
            Kind::Sign(_) | Kind::End => return Err(self.unexpected("an expression")),
        };
        self.next += 1;
        Ok(self.expr_from(first, kind))
    }
}

const COMPARISON: u8 = 4;

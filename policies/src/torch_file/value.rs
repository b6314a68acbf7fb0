//! What a pickle may hold and which names it may use.

use super::Checked;
use super::view::{Kind, Storage, View};

/// The place of a value in its [`Pickle`](super::pickle::Pickle).
pub(super) type Id = usize;

/// A value.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Node<'a> {
    /// None, a truth value or a float, which no tensor depends on.
    Other,
    Int(i64),
    Text(&'a str),
    Name(Name),
    /// A tuple or a list.
    Sequence(Vec<Id>),
    Map(Vec<(Id, Id)>),
    /// A module, with the map of its attributes once it has them.
    Object(Option<Id>),
    Storage(Storage<'a>),
    Tensor(View<'a>),
}

/// The names that a pickle may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Name {
    /// A scripted module's class.
    Class,
    /// `collections.OrderedDict`.
    Map,
    /// Makes a tensor of storage, offset, shape and strides.
    Tensor,
    /// Hands its first argument on: a parameter's tensor, a typed list's items.
    First,
    /// A storage's class.
    Storage(Kind),
}

impl Name {
    pub(super) fn of(module: &str, name: &str) -> Checked<Self> {
        match (module, name, Kind::of_class(name)) {
            ("torch", _, Some(kind)) => Ok(Self::Storage(kind)),
            ("collections", "OrderedDict", _) => Ok(Self::Map),
            ("torch._utils", "_rebuild_tensor_v2", _) => Ok(Self::Tensor),
            ("torch._utils", "_rebuild_parameter", _) => Ok(Self::First),
            (
                "torch.jit._pickle",
                "build_intlist" | "build_doublelist" | "build_boollist" | "build_tensorlist" | "restore_type_tag",
                _,
            ) => Ok(Self::First),
            ("__torch__", ..) => Ok(Self::Class),
            _ if module.starts_with("__torch__.") => Ok(Self::Class),
            _ => Err(format!(
                "asks for `{module}.{name}`, and nothing is run here; save plain weights with \
                 torch.save(model.state_dict(), path)"
            )),
        }
    }
}

/// The error of a value of another kind than the one that is due.
pub(super) fn wrong(due: &str, node: &Node) -> String {
    let got = match node {
        Node::Other => "none, a truth value or a float".into(),
        Node::Sequence(items) => format!("a sequence of {}", items.len()),
        Node::Map(items) => format!("a map of {}", items.len()),
        Node::Object(_) => "a module".into(),
        Node::Tensor(_) => "a tensor".into(),
        Node::Text(text) => format!("a text of {} bytes", text.len()),
        Node::Int(number) => format!("the number {number}"),
        Node::Name(name) => format!("the name of a {name:?}"),
        Node::Storage(_) => "a storage".into(),
    };
    format!("{got} where {due} is due; the file is damaged, copy it again")
}

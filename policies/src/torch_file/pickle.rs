//! A reader of pickles that executes nothing.
//!
//! A pickle is a program for a stack machine, and Python's runs whatever function it names. This one knows the
//! opcodes that torch writes (protocol 2) and a handful of names, each of which makes a value; any other name is an
//! error. Values lie in one list and refer to each other by their places in it, so shared and circular values cost
//! nothing and nothing recurses; there are never more of them than bytes in the file.

use std::collections::BTreeMap;

use super::Checked;
use super::value::{Id, Name, Node, wrong};
use super::view::{Storage, View};

/// Dimensions of a tensor; published ones have five.
const MOST_DIMENSIONS: usize = 8;

/// What a pickle describes.
pub(super) struct Pickle<'a> {
    nodes: Vec<Node<'a>>,
    root: Id,
}

impl<'a> Pickle<'a> {
    /// Runs the machine over a whole pickle.
    pub(super) fn read(bytes: &'a [u8]) -> Checked<Self> {
        let mut machine = Machine::new(bytes);
        loop {
            let at = machine.at;
            match machine.step() {
                Ok(None) => {}
                Ok(Some(root)) => return Ok(Self { nodes: machine.nodes, root }),
                Err(message) => return Err(format!("data.pkl at byte {at}: {message}")),
            }
        }
    }

    pub(super) fn root(&self) -> &Node<'a> {
        self.node(self.root)
    }

    pub(super) fn node(&self, id: Id) -> &Node<'a> {
        &self.nodes[id]
    }
}

/// The stack machine. Identifiers are made by [`Machine::push`] alone, so they always have a node.
struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    nodes: Vec<Node<'a>>,
    stack: Vec<Id>,
    /// How high the stack was at each open mark.
    marks: Vec<usize>,
    memo: BTreeMap<u32, Id>,
}

impl<'a> Machine<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0, nodes: Vec::new(), stack: Vec::new(), marks: Vec::new(), memo: BTreeMap::new() }
    }

    /// Runs an opcode; the pickle's value after the last.
    fn step(&mut self) -> Checked<Option<Id>> {
        let opcode = self.number(1)? as u8;
        match opcode {
            b'.' => return self.pop().map(Some),
            0x80 => self.protocol()?,
            b'(' => self.marks.push(self.stack.len()),
            b'c' => self.global()?,
            b'X' => self.text()?,
            b'K' => self.unsigned(1)?,
            b'M' => self.unsigned(2)?,
            b'J' => self.signed(4)?,
            0x8A => {
                let width = self.number(1)? as usize;
                self.signed(width)?;
            }
            b'G' => {
                self.take(8)?;
                self.push(Node::Other);
            }
            b'N' | 0x88 | 0x89 => self.push(Node::Other),
            b')' | b']' => self.push(Node::Sequence(Vec::new())),
            b'}' => self.push(Node::Map(Vec::new())),
            b't' => {
                let items = self.pop_to_mark()?;
                self.push(Node::Sequence(items));
            }
            0x85..=0x87 => self.short_tuple(usize::from(opcode - 0x84))?,
            b'q' => self.remember(1)?,
            b'r' => self.remember(4)?,
            b'h' => self.recall(1)?,
            b'j' => self.recall(4)?,
            b'a' => {
                let item = self.pop()?;
                self.append(vec![item])?;
            }
            b'e' => {
                let items = self.pop_to_mark()?;
                self.append(items)?;
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set_items(&[key, value])?;
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.set_items(&items)?;
            }
            0x81 => self.new_object()?,
            b'b' => self.build()?,
            b'Q' => self.storage()?,
            b'R' => self.reduce()?,
            other => return Err(format!("opcode {other:#04x} is none that torch writes; save the file again")),
        }
        Ok(None)
    }

    /// The next bytes of the pickle.
    fn take(&mut self, n: usize) -> Checked<&'a [u8]> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        match rest.get(..n) {
            Some(bytes) => {
                self.at += n;
                Ok(bytes)
            }
            None => Err(format!("{n} bytes are due and {} left; the file is cut short, copy it again", rest.len())),
        }
    }

    /// An unsigned little-endian number of up to 8 bytes.
    fn number(&mut self, width: usize) -> Checked<u64> {
        let bytes = self.take(width)?;
        Ok(bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
    }

    fn protocol(&mut self) -> Checked<()> {
        match self.number(1)? {
            0..=2 => Ok(()),
            other => Err(format!("protocol {other} where torch writes 2; save with pickle_protocol=2")),
        }
    }

    /// Up to a line's end.
    fn line(&mut self) -> Checked<&'a str> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let Some(n) = rest.iter().position(|&byte| byte == b'\n') else {
            return Err("a name without an end; the file is cut short, copy it again".into());
        };
        let line = self.take(n)?;
        self.take(1)?;
        std::str::from_utf8(line).map_err(|error| format!("a name that is no text: {error}; copy the file again"))
    }

    fn global(&mut self) -> Checked<()> {
        let (module, name) = (self.line()?, self.line()?);
        let name = Name::of(module, name)?;
        self.push(Node::Name(name));
        Ok(())
    }

    fn text(&mut self) -> Checked<()> {
        let n = self.number(4)? as usize;
        let text = std::str::from_utf8(self.take(n)?);
        let text = text.map_err(|error| format!("a string that is no text: {error}; copy the file again"))?;
        self.push(Node::Text(text));
        Ok(())
    }

    fn unsigned(&mut self, width: usize) -> Checked<()> {
        let number = self.number(width)?;
        self.push(Node::Int(number as i64));
        Ok(())
    }

    /// An integer in two's complement.
    fn signed(&mut self, width: usize) -> Checked<()> {
        if width > 8 {
            return Err(format!("an integer of {width} bytes; sizes have at most 8, save the file again"));
        }
        let unused = 64 - 8 * width.max(1);
        let number = (self.number(width)? << unused) as i64 >> unused;
        self.push(Node::Int(number));
        Ok(())
    }

    fn push(&mut self, node: Node<'a>) {
        self.stack.push(self.nodes.len());
        self.nodes.push(node);
    }

    /// The top of the stack, above the innermost mark.
    fn pop(&mut self) -> Checked<Id> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.pop() {
            Some(id) if self.stack.len() >= floor => Ok(id),
            _ => Err("the stack is empty where a value is due; the file is damaged, copy it again".into()),
        }
    }

    fn pop_to_mark(&mut self) -> Checked<Vec<Id>> {
        match self.marks.pop() {
            Some(mark) if mark <= self.stack.len() => Ok(self.stack.split_off(mark)),
            _ => Err("no mark is set where one is due; the file is damaged, copy it again".into()),
        }
    }

    /// The value that stays on top while it is filled.
    fn top(&mut self) -> Checked<&mut Node<'a>> {
        let id = self.pop()?;
        self.stack.push(id);
        Ok(&mut self.nodes[id])
    }

    fn short_tuple(&mut self, n: usize) -> Checked<()> {
        let mut items = Vec::with_capacity(n);
        for _ in 0..n {
            items.push(self.pop()?);
        }
        items.reverse();
        self.push(Node::Sequence(items));
        Ok(())
    }

    fn remember(&mut self, width: usize) -> Checked<()> {
        let key = self.number(width)? as u32;
        let id = self.pop()?;
        self.stack.push(id);
        self.memo.insert(key, id);
        Ok(())
    }

    fn recall(&mut self, width: usize) -> Checked<()> {
        let key = self.number(width)? as u32;
        match self.memo.get(&key) {
            Some(&id) => self.stack.push(id),
            None => return Err(format!("memo {key} was never written; the file is damaged, copy it again")),
        }
        Ok(())
    }

    fn append(&mut self, items: Vec<Id>) -> Checked<()> {
        match self.top()? {
            Node::Sequence(list) => list.extend(items),
            other => return Err(wrong("a list", other)),
        }
        Ok(())
    }

    fn set_items(&mut self, items: &[Id]) -> Checked<()> {
        let (pairs, rest) = items.as_chunks::<2>();
        match self.top()? {
            Node::Map(map) if rest.is_empty() => map.extend(pairs.iter().map(|&[key, value]| (key, value))),
            Node::Map(_) => return Err("a key without a value; the file is damaged, copy it again".into()),
            other => return Err(wrong("a map", other)),
        }
        Ok(())
    }

    fn new_object(&mut self) -> Checked<()> {
        let (arguments, class) = (self.pop()?, self.pop()?);
        match (&self.nodes[class], &self.nodes[arguments]) {
            (Node::Name(Name::Class), Node::Sequence(none)) if none.is_empty() => self.push(Node::Object(None)),
            (other, _) => return Err(wrong("a module's class", other)),
        }
        Ok(())
    }

    /// Gives an object its attributes; an ordered map's own (a state dict's versions) are left aside.
    fn build(&mut self) -> Checked<()> {
        let state = self.pop()?;
        match self.top()? {
            Node::Object(attributes) => *attributes = Some(state),
            Node::Map(_) => {}
            other => return Err(wrong("a module", other)),
        }
        Ok(())
    }

    /// `("storage", class, key, device, count)`.
    fn storage(&mut self) -> Checked<()> {
        let id = self.pop()?;
        let [tag, class, key, _, count] = self.arguments(id)?;
        match (tag, class, key, count) {
            (Node::Text("storage"), &Node::Name(Name::Storage(kind)), &Node::Text(key), &Node::Int(count @ 0..)) => {
                self.push(Node::Storage(Storage { kind, key, n_numbers: count as u64 }));
                Ok(())
            }
            _ => Err("a reference to something other than a storage of numbers; save a plain state dict".into()),
        }
    }

    fn reduce(&mut self) -> Checked<()> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let made = match &self.nodes[function] {
            Node::Name(Name::Map) => match &self.nodes[arguments] {
                Node::Sequence(none) if none.is_empty() => Node::Map(Vec::new()),
                other => return Err(wrong("an ordered map's empty arguments", other)),
            },
            Node::Name(Name::Tensor) => Node::Tensor(self.tensor(arguments)?),
            Node::Name(Name::First) => {
                let Node::Sequence(items) = &self.nodes[arguments] else {
                    return Err(wrong("arguments", &self.nodes[arguments]));
                };
                let Some(&first) = items.first() else {
                    return Err("a call without arguments; the file is damaged, copy it again".into());
                };
                self.stack.push(first);
                return Ok(());
            }
            other => return Err(wrong("a function", other)),
        };
        self.push(made);
        Ok(())
    }

    /// `(storage, offset, shape, strides, ...)`; what follows concerns gradients.
    fn tensor(&self, arguments: Id) -> Checked<View<'a>> {
        let [storage, offset, shape, strides] = self.arguments(arguments)?;
        let &Node::Storage(storage) = storage else {
            return Err(wrong("a storage", storage));
        };
        let &Node::Int(offset @ 0..) = offset else {
            return Err(wrong("an offset", offset));
        };
        let (shape, strides) = (self.sizes(shape)?, self.sizes(strides)?);
        if shape.len() != strides.len() {
            return Err(format!(
                "a tensor of {} dimensions with {} strides; the file is damaged, copy it again",
                shape.len(),
                strides.len()
            ));
        }
        let shape = shape.into_iter().map(|size| size as usize).collect();
        Ok(View { storage, offset: offset as u64, shape, strides })
    }

    /// The first values of a sequence that has at least so many.
    fn arguments<const N: usize>(&self, id: Id) -> Checked<[&Node<'a>; N]> {
        match &self.nodes[id] {
            Node::Sequence(items) => match items.first_chunk::<N>() {
                Some(items) => Ok(items.map(|id| &self.nodes[id])),
                None => Err(format!("{} values where {N} are due; the file is damaged, copy it again", items.len())),
            },
            other => Err(wrong("a tuple", other)),
        }
    }

    fn sizes(&self, node: &Node) -> Checked<Vec<u64>> {
        let Node::Sequence(items) = node else {
            return Err(wrong("a shape", node));
        };
        if items.len() > MOST_DIMENSIONS {
            return Err(format!("a tensor of {} dimensions; at most {MOST_DIMENSIONS} are read", items.len()));
        }
        let size = |&id: &Id| match self.nodes[id] {
            Node::Int(size @ 0..) => Ok(size as u64),
            ref other => Err(wrong("a size", other)),
        };
        items.iter().map(size).collect()
    }
}

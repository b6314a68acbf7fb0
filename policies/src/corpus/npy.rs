//! NumPy's array files, read strictly for one purpose: visual codes.
//!
//! The format (numpy.lib.format): `\x93NUMPY`, a version, the length of a header, the header as the text of a Python
//! dictionary, the numbers. The text is read by hand and nothing in it is evaluated; its numbers are compared with the
//! bytes that are there, so that no memory is taken on its word.

use super::entry::{Content, Fault, Reason};

const MAGIC: &[u8] = b"\x93NUMPY";

/// The codes of an array `(1, 1, h, w)`, `(1, h, w)` or `(h, w)` of integers in C order.
pub(super) fn codes(bytes: &[u8]) -> Result<Content, Fault> {
    let (header, data) = split(bytes).ok_or_else(|| damaged("not a NumPy file of version 1.0 or 2.0"))?;
    let header = Header::read(header).ok_or_else(|| damaged("the header is not one that NumPy writes"))?;
    let width = header.width()?;
    let grid = header.grid()?;
    let n_bytes = header.shape.iter().try_fold(width, |n, side| n.checked_mul(*side));
    if n_bytes != Some(data.len()) {
        let shape = &header.shape;
        return Err(damaged(format!("shape {shape:?} of `{}` does not make {} bytes", header.kind, data.len())));
    }
    let codes = data.chunks_exact(width).map(|number| code(number, header.signed())).collect::<Result<_, _>>()?;
    Ok(Content::Codes { codes, grid })
}

fn damaged(detail: impl Into<String>) -> Fault {
    Fault::new(Reason::DamagedEntry, detail)
}

fn wrong(detail: impl Into<String>) -> Fault {
    Fault::new(Reason::WrongCodes, detail)
}

/// The header's text and what follows it.
fn split(bytes: &[u8]) -> Option<(&str, &[u8])> {
    let (version, rest) = bytes.strip_prefix(MAGIC)?.split_first_chunk::<2>()?;
    let (length, rest) = match version {
        [1, 0] => rest.split_first_chunk::<2>().map(|(n, rest)| (u32::from(u16::from_le_bytes(*n)), rest))?,
        [2, 0] => rest.split_first_chunk::<4>().map(|(n, rest)| (u32::from_le_bytes(*n), rest))?,
        _ => return None,
    };
    let (header, data) = rest.split_at_checked(usize::try_from(length).ok()?)?;
    Some((std::str::from_utf8(header).ok()?, data))
}

/// A little-endian number of two, four or eight bytes that must be a code.
fn code(number: &[u8], signed: bool) -> Result<u16, Fault> {
    let fill = if signed && number.last().is_some_and(|byte| byte & 0x80 != 0) { 0xFF } else { 0 };
    let mut wide = [fill; 8];
    wide[..number.len()].copy_from_slice(number);
    let value = i64::from_le_bytes(wide);
    u16::try_from(value).map_err(|_| wrong(format!("code {value}; codes are from 0 to 65535")))
}

/// What the dictionary says.
struct Header {
    kind: String,
    fortran_order: bool,
    shape: Vec<usize>,
}

impl Header {
    fn read(text: &str) -> Option<Self> {
        let mut text = Text(text);
        let (mut kind, mut fortran_order, mut shape) = (None, None, None);
        text.eat("{")?;
        while text.eat("}").is_none() {
            let key = text.quoted()?;
            text.eat(":")?;
            // A key that is there twice would say two things.
            let again = match key {
                "descr" => kind.replace(text.quoted()?.to_owned()).is_some(),
                "fortran_order" => fortran_order.replace(text.truth()?).is_some(),
                "shape" => shape.replace(text.shape()?).is_some(),
                _ => return None,
            };
            if again || (text.eat(",").is_none() && !text.0.trim_start().starts_with('}')) {
                return None;
            }
        }
        let padded = text.0.chars().all(char::is_whitespace);
        padded.then_some(Self { kind: kind?, fortran_order: fortran_order?, shape: shape? })
    }

    /// Bytes of one number.
    fn width(&self) -> Result<usize, Fault> {
        match self.kind.as_str() {
            "<i2" | "<u2" => Ok(2),
            "<i4" | "<u4" => Ok(4),
            "<i8" => Ok(8),
            other => Err(wrong(format!("numbers of type {other:?}; codes are <i2, <u2, <i4, <u4 or <i8"))),
        }
    }

    fn signed(&self) -> bool {
        self.kind.contains('i')
    }

    fn grid(&self) -> Result<(usize, usize), Fault> {
        let ([1, 1, h, w] | [1, h, w] | [h, w], false) = (&self.shape[..], self.fortran_order) else {
            let order = if self.fortran_order { "Fortran" } else { "C" };
            let expected = "codes have (1, 1, h, w), (1, h, w) or (h, w) in C order";
            return Err(wrong(format!("shape {:?} in {order} order; {expected}", self.shape)));
        };
        match *h > 0 && *w > 0 {
            true => Ok((*h, *w)),
            false => Err(wrong(format!("shape {:?} holds no code", self.shape))),
        }
    }
}

/// What is still to be read of a header.
struct Text<'a>(&'a str);

impl<'a> Text<'a> {
    fn eat(&mut self, token: &str) -> Option<()> {
        self.0 = self.0.trim_start().strip_prefix(token)?;
        Some(())
    }

    fn quoted(&mut self) -> Option<&'a str> {
        let quote = if self.eat("'").is_some() { '\'' } else { self.eat("\"").map(|()| '"')? };
        let (inner, rest) = self.0.split_once(quote)?;
        self.0 = rest;
        Some(inner)
    }

    fn truth(&mut self) -> Option<bool> {
        self.eat("True").map(|()| true).or_else(|| self.eat("False").map(|()| false))
    }

    fn shape(&mut self) -> Option<Vec<usize>> {
        /// NumPy's own limit.
        const MOST_AXES: usize = 64;
        let mut shape = Vec::new();
        self.eat("(")?;
        while self.eat(")").is_none() {
            self.0 = self.0.trim_start();
            let end = self.0.find(|c: char| !c.is_ascii_digit())?;
            let (digits, rest) = self.0.split_at(end);
            shape.push(digits.parse().ok()?);
            self.0 = rest;
            if shape.len() > MOST_AXES || (self.eat(",").is_none() && !self.0.trim_start().starts_with(')')) {
                return None;
            }
        }
        Some(shape)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A file as `np.save` writes it.
    pub(in super::super) fn file(kind: &str, shape: &str, data: &[u8]) -> Vec<u8> {
        let header = format!("{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}");
        with_header(&header, data)
    }

    fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
        let padding = (10 + header.len() + 1).next_multiple_of(64) - 11 - header.len();
        let header = format!("{header}{}\n", " ".repeat(padding));
        [MAGIC, &[1, 0], &(header.len() as u16).to_le_bytes(), header.as_bytes(), data].concat()
    }

    /// Codes and their grid, or the reason with a part of the message.
    type Expected<'a> = Result<(&'a [u16], (usize, usize)), (Reason, &'a str)>;

    fn check(bytes: &[u8], expected: Expected) {
        match (codes(bytes), expected) {
            (Ok(got), Ok((codes, grid))) => assert_eq!(got, Content::Codes { codes: codes.to_vec(), grid }),
            (Err(fault), Err((reason, part))) => {
                assert_eq!(fault.reason, reason, "{fault:?}");
                assert!(fault.detail.contains(part), "{fault:?} does not say {part:?}");
            }
            (got, expected) => panic!("{got:?} for {expected:?}"),
        }
    }

    #[test]
    fn codes_of_every_type_and_shape() {
        let i4: Vec<u8> = [7i32, 0, 63_999, 65_535, 1, 2].iter().flat_map(|n| n.to_le_bytes()).collect();
        let expected: &[u16] = &[7, 0, 63_999, 65_535, 1, 2];
        check(&file("<i4", "(1, 1, 2, 3)", &i4), Ok((expected, (2, 3))));
        check(&file("<u4", "(1, 3, 2)", &i4), Ok((expected, (3, 2))));
        let i8: Vec<u8> = [7i64, 65_535].iter().flat_map(|n| n.to_le_bytes()).collect();
        check(&file("<i8", "(1,2)", &i8), Ok((&[7, 65_535], (1, 2))));
        check(&file("<u2", "(2, 1)", &[0xFF, 0xFF, 1, 0]), Ok((&[65_535, 1], (2, 1))));
        check(&file("<i2", "(2, 1)", &[0xFF, 0x7F, 1, 0]), Ok((&[32_767, 1], (2, 1))));
        let mut second = file("<u2", "(1, 1)", &[5, 0]);
        second[6] = 2;
        second.splice(10..10, [0, 0]);
        check(&second, Ok((&[5], (1, 1))));
    }

    #[test]
    fn what_is_not_codes_is_refused() {
        let i4 = 70_000i32.to_le_bytes();
        let wrong = |part| Err((Reason::WrongCodes, part));
        let damaged = |part| Err((Reason::DamagedEntry, part));
        check(&file("<i4", "(1, 1)", &i4), wrong("code 70000; codes are from 0 to 65535"));
        check(&file("<i4", "(1, 1)", &[0xFF; 4]), wrong("code -1"));
        check(&file("<i2", "(1, 1)", &[0, 0x80]), wrong("code -32768"));
        check(&file("<i8", "(1, 1)", &[0, 0, 0, 0, 1, 0, 0, 0]), wrong("code 4294967296"));
        check(&file("<f4", "(1, 1)", &i4), wrong("type \"<f4\""));
        check(&file(">i4", "(1, 1)", &i4), wrong("type \">i4\""));
        check(&file("|O", "(1, 1)", &i4), wrong("type \"|O\""));
        check(&file("<i4", "(2, 1, 1)", &[0; 8]), wrong("shape [2, 1, 1] in C order"));
        check(&file("<i4", "(1,)", &i4), wrong("shape [1]"));
        check(&file("<i4", "(3, 0)", &[]), wrong("holds no code"));
        check(&file("<i4", "()", &i4), wrong("shape []"));
        let fortran = "{'descr': '<i4', 'fortran_order': True, 'shape': (1, 1), }";
        check(&with_header(fortran, &i4), wrong("Fortran order"));
        check(&file("<i4", "(1, 2)", &i4), damaged("shape [1, 2] of `<i4` does not make 4 bytes"));
        check(&file("<i4", "(1, 1)", &[0; 5]), damaged("does not make 5 bytes"));
        check(&file("<i4", "(1000000, 1000000)", &i4), damaged("does not make 4 bytes"));
        check(&file("<i4", "(18446744073709551615, 2)", &i4), damaged("does not make"));
        check(&file("<i4", "(184467440737095516150, 2)", &i4), damaged("the header is not"));
        check(&file("<i4", "(-1, 1)", &i4), damaged("the header is not"));
    }

    #[test]
    fn headers_are_numpys() {
        let damaged = Err((Reason::DamagedEntry, "the header is not one that NumPy writes"));
        for header in [
            "{'descr': '<i4', 'fortran_order': False, 'shape': (1, 1), 'shape': (1, 1), }",
            "{'descr': '<i4', 'fortran_order': False}",
            "{'descr': '<i4', 'fortran_order': False, 'shape': (1, 1), 'more': 1}",
            "{'descr': '<i4' 'fortran_order': False, 'shape': (1, 1)}",
            "{'descr': '<i4', 'fortran_order': exit(), 'shape': (1, 1)}",
            "{'descr': '<i4', 'fortran_order': False, 'shape': (1 1)}",
            "{'descr': '<i4', 'fortran_order': False, 'shape': (1, 1)} or exit()",
            "{'descr': [('a', '<i4')], 'fortran_order': False, 'shape': (1, 1)}",
            "{",
            "",
        ] {
            check(&with_header(header, &[0; 4]), damaged);
        }
        let strange = "  { \"shape\" : ( 1 , 1 , ) , 'fortran_order':False,'descr':\"<i4\"}";
        check(&with_header(strange, &[0; 4]), Ok((&[0], (1, 1))));
        let not_numpy = Err((Reason::DamagedEntry, "not a NumPy file"));
        for bytes in [&b""[..], b"\x93NUMPY", b"\x93NUMPY\x03\0\x02\0{}", b"\x93NUMPY\x01\0\xFF\xFF{}", b"a caption"] {
            check(bytes, not_numpy);
        }
    }
}

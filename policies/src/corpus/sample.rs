//! The samples of a WebDataset archive: which member belongs to which, and as what.

use super::archive::{Kind, Member};
use super::entry::{Fault, Reason};
use super::files::{MOST_PICTURE_BYTES, MOST_TEXT_BYTES, shown, too_large};

/// Longer names are no data set's.
const LONGEST_NAME: usize = 1024;

/// First byte and size of a body.
pub(super) type Span = (u64, u64);

/// Where the parts of a sample lie.
#[derive(Default)]
pub(super) struct Sample {
    pub key: String,
    pub picture: Option<Span>,
    pub text: Option<Span>,
    pub json: Option<Span>,
    /// The first thing that is wrong with its members.
    pub fault: Option<Fault>,
}

/// What a member is to the samples.
pub(super) enum Part {
    /// A folder, or a file that no sample is read from.
    Nothing,
    /// A member whose name is not to be trusted; `shown` stands for it.
    Unsafe { shown: String, fault: Fault },
    /// A file of the sample `key` whose body the archive does not hold to its end.
    Cut { key: String },
    /// Something of the sample `key`.
    Of { key: String, member: Role },
}

/// What a member is to its sample.
pub(super) enum Role {
    Picture(Span),
    Text(Span),
    Json(Span),
    Fault(Fault),
}

impl Part {
    /// `whole` says whether the archive holds all of the body.
    pub(super) fn of(member: &Member, whole: bool) -> Self {
        let Some(name) = plain(&member.name) else {
            let rule = "letters, digits, `.`, `_`, `-` and `/`, without `..` or a leading `/`";
            let fault =
                Fault::new(Reason::UnsafeName, format!("a name has {rule}, and at most {LONGEST_NAME} of them"));
            return Self::Unsafe { shown: shown(&member.name), fault };
        };
        let file = name.rfind('/').map_or(0, |slash| slash + 1);
        let (key, extension) = match name[file..].find('.') {
            Some(dot) if dot > 0 => (&name[..file + dot], &name[file + dot + 1..]),
            // The original's pattern wants something before the dot; so no hidden file is a part of a sample.
            _ => (name, ""),
        };
        // As webdataset itself reads them.
        let extension = extension.to_ascii_lowercase();
        let span = (member.start, member.size);
        let (role, limit): (fn(Span) -> Role, u64) = match (member.kind, extension.as_str()) {
            (Kind::Other(what), _) => {
                let fault = Fault::new(
                    Reason::NotAFile,
                    format!("{} is {what}; only plain files are read", shown(&member.name)),
                );
                return Self::Of { key: key.to_owned(), member: Role::Fault(fault) };
            }
            (Kind::File, "jpg" | "jpeg" | "png" | "webp") => (Role::Picture, MOST_PICTURE_BYTES),
            (Kind::File, "txt") => (Role::Text, MOST_TEXT_BYTES),
            (Kind::File, "json") => (Role::Json, MOST_TEXT_BYTES),
            _ => return Self::Nothing,
        };
        let key = key.to_owned();
        match (member.size > limit, whole) {
            (true, _) => {
                Self::Of { key, member: Role::Fault(too_large(member.size, limit).within(&format!(".{extension}"))) }
            }
            (false, false) => Self::Cut { key },
            (false, true) => Self::Of { key, member: role(span) },
        }
    }
}

/// A name without `./` before and `/` behind, if it is one that a data set may have.
fn plain(name: &[u8]) -> Option<&str> {
    let mut name = std::str::from_utf8(name).ok().filter(|name| name.len() <= LONGEST_NAME && !name.is_empty())?;
    while let Some(rest) = name.strip_prefix("./") {
        name = rest;
    }
    let plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._/-".contains(&byte));
    let stays = !name.starts_with('/') && name.split('/').all(|part| part != "..");
    (plain && stays).then(|| name.trim_end_matches('/'))
}

impl Sample {
    pub(super) fn of(key: String) -> Self {
        Self { key, ..Self::default() }
    }

    /// Whether the sample does not end before this.
    pub(super) fn goes_on_with<E>(&self, met: &Result<Option<Part>, E>) -> bool {
        match met {
            Ok(Some(Part::Nothing)) => true,
            Ok(Some(Part::Of { key, .. } | Part::Cut { key })) => *key == self.key,
            _ => false,
        }
    }

    pub(super) fn add(&mut self, role: Role) {
        let (place, span, what) = match role {
            Role::Picture(span) => (&mut self.picture, span, "pictures"),
            Role::Text(span) => (&mut self.text, span, "files .txt"),
            Role::Json(span) => (&mut self.json, span, "files .json"),
            Role::Fault(fault) => {
                self.fault.get_or_insert(fault);
                return;
            }
        };
        if place.replace(span).is_some() {
            let fault = Fault::new(Reason::DamagedEntry, format!("sample {} has two {what}", self.key));
            self.fault.get_or_insert(fault);
        }
    }
}

//! What a corpus yields: an entry, or the reason why there is none.

use serde::{Deserialize, Serialize};

/// One sample as it stands in a corpus.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// What a message names, relative to the corpus: `00003.tar/000031`.
    pub name: String,
    /// The image.
    pub content: Content,
    /// What is said of it.
    pub caption: Caption,
}

/// An image in the form in which a corpus keeps it.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    /// An encoded picture: PNG, JPEG or WebP.
    Encoded(Vec<u8>),
    /// Pixels.
    Picture(image::RgbImage),
    /// Visual codes in raster order, with rows and columns.
    Codes {
        /// Row after row.
        codes: Vec<u16>,
        /// Rows and columns, whose product is the number of codes.
        grid: (usize, usize),
    },
}

/// What is said of an image: the lines of SimpleAR's label files.
///
/// There is at least one line and not all are empty. Line 0 is the short caption, line 1 the long one; a single line
/// is both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caption {
    /// Without white space at their ends.
    pub lines: Vec<String>,
}

/// An entry that is left out, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// As [`Entry::name`]; that of a file where the file itself is damaged.
    pub name: String,
    /// What is counted.
    pub reason: Reason,
    /// What a person reads: the name, what is wrong, and the limit that it breaks.
    pub message: String,
}

/// An entry, or why it is left out.
pub type Found = Result<Entry, Skipped>;

/// Why an entry is left out; the names are what is counted and shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Reason {
    /// There is a caption, or a key, but no image.
    NoPicture,
    /// There is an image that nothing is said of.
    NoCaption,
    /// The caption is white space.
    EmptyCaption,
    /// The caption's bytes are not UTF-8; they are never guessed at.
    CaptionNotUtf8,
    /// A file that a list names cannot be opened or read.
    UnreadableFile,
    /// The format is broken: an archive cut short, a line that is not JSON, an array of the wrong size.
    DamagedEntry,
    /// A name that leaves the corpus or has characters that no data set needs.
    UnsafeName,
    /// A link, device, folder or the like where a file is due.
    NotAFile,
    /// More bytes than an entry may have.
    TooLarge,
    /// An array of another type or shape than codes have, or a code that cannot be one.
    WrongCodes,
    /// The picture cannot be decoded.
    DamagedPicture,
    /// The picture is of no known format.
    UnknownPicture,
    /// The shorter edge is below the limit.
    ShortEdge,
    /// The picture is too long for its height, or too high for its length.
    Aspect,
    /// The caption has too few words.
    CaptionWords,
    /// The same picture was met before.
    Duplicate,
}

impl Reason {
    /// The name under which it is counted; serde writes the same.
    pub fn name(self) -> &'static str {
        match self {
            Self::NoPicture => "no_picture",
            Self::NoCaption => "no_caption",
            Self::EmptyCaption => "empty_caption",
            Self::CaptionNotUtf8 => "caption_not_utf8",
            Self::UnreadableFile => "unreadable_file",
            Self::DamagedEntry => "damaged_entry",
            Self::UnsafeName => "unsafe_name",
            Self::NotAFile => "not_a_file",
            Self::TooLarge => "too_large",
            Self::WrongCodes => "wrong_codes",
            Self::DamagedPicture => "damaged_picture",
            Self::UnknownPicture => "unknown_picture",
            Self::ShortEdge => "short_edge",
            Self::Aspect => "aspect",
            Self::CaptionWords => "caption_words",
            Self::Duplicate => "duplicate",
        }
    }
}

/// What is wrong with an entry whose name the reader of a part does not know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub reason: Reason,
    pub detail: String,
}

impl Fault {
    pub(super) fn new(reason: Reason, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into() }
    }

    /// Says which part of the entry it is about.
    pub(super) fn within(self, part: &str) -> Self {
        Self { detail: format!("{part}: {}", self.detail), ..self }
    }

    pub(super) fn of(self, name: String) -> Skipped {
        Skipped { message: format!("{name}: {}", self.detail), name, reason: self.reason }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_written_under_their_names() {
        use Reason::*;
        for reason in [
            NoPicture,
            NoCaption,
            EmptyCaption,
            CaptionNotUtf8,
            UnreadableFile,
            DamagedEntry,
            UnsafeName,
            NotAFile,
            TooLarge,
            WrongCodes,
            DamagedPicture,
            UnknownPicture,
            ShortEdge,
            Aspect,
            CaptionWords,
            Duplicate,
        ] {
            assert_eq!(serde_json::to_value(reason).unwrap(), reason.name());
            assert_eq!(serde_json::from_value::<Reason>(reason.name().into()).unwrap(), reason);
        }
    }
}

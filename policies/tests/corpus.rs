//! Corpora written by Python's tarfile, numpy and pyarrow (`golden/corpus.py`), read entry by entry.

#![expect(clippy::unwrap_used, reason = "a test and its helpers fail by panicking")]

use std::path::Path;

use grpo_policies::corpus::{Caption, Columns, Content, Found, Reason, open};

type Expected<'a> = Result<(&'a str, &'a [&'a str], Content), (&'a str, Reason)>;

fn check(name: &str, expected: &[Expected]) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/corpus").join(name);
    let corpus = open(&path, &Columns::default(), None).unwrap();
    let found: Vec<Found> = corpus.entries(0).unwrap().collect::<Result<_, _>>().unwrap();
    assert_eq!(found.len(), expected.len(), "{found:?}");
    for (found, expected) in found.iter().zip(expected) {
        let lines = |caption: &Caption| caption.lines.join("\n");
        let found = found.as_ref().map(|entry| (entry.name.as_str(), lines(&entry.caption), &entry.content));
        let found = found.map_err(|skipped| (skipped.name.as_str(), skipped.reason));
        let expected = expected.as_ref().map(|(name, lines, content)| (*name, lines.join("\n"), content));
        assert_eq!(found, expected.map_err(|skipped| *skipped));
    }
}

fn encoded(text: &str) -> Content {
    Content::Encoded(text.as_bytes().to_vec())
}

#[test]
fn an_archive_by_tarfile() {
    let long = format!("00000.tar/{}", "k".repeat(120));
    check(
        "00000.tar",
        &[
            Ok(("00000.tar/000000", &["a caption of two lines", "a long one"], encoded("picture 0"))),
            Ok((&long, &["un été"], encoded("picture 1"))),
            Ok(("00000.tar/000002", &["from json: ☃"], encoded("picture 2"))),
            Err(("00000.tar/000003", Reason::NoCaption)),
        ],
    );
}

#[test]
fn token_folders_by_numpy() {
    let codes = |codes: [u16; 4]| Content::Codes { codes: codes.to_vec(), grid: (2, 2) };
    check(
        "32_codes",
        &[
            Ok(("32_codes/0.npy", &["caption 0"], codes([0, 900, 1800, 2700]))),
            Ok(("32_codes/1.npy", &["short", "long"], codes([6300, 7200, 8100, 9000]))),
            Err(("32_codes/10.npy", Reason::WrongCodes)),
        ],
    );
}

#[test]
#[cfg(feature = "parquet")]
fn a_table_by_pyarrow() {
    check(
        "table.parquet",
        &[
            Ok(("table.parquet/0", &["a"], encoded("picture 0"))),
            Ok(("table.parquet/1", &["un été", "c d"], encoded("picture 1"))),
            Err(("table.parquet/2", Reason::NoPicture)),
            Err(("table.parquet/3", Reason::NoCaption)),
        ],
    );
}

//! Folders of tokens: the same bytes however they were made, and damage that is named.

#![expect(clippy::unwrap_used, reason = "a test and its helpers fail by panicking")]

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Device;
use grpo::picture::Transparency;
use grpo::{Error, Seed};
use grpo_policies::corpus::{Caption, Columns, Content, Corpus, Entries, Entry, Reason, Skipped};
use grpo_policies::cosmos::Cosmos;
use grpo_policies::simplear::shapes_cosmos;
use grpo_policies::tokens::{Filter, MANIFEST, Manifest, Order, Settings, TokenSet, Workers, pictures, tokenise};
use image::{ImageFormat, RgbImage};

/// A corpus that breaks before its entry number `breaks_at`.
struct Made {
    entries: Vec<Result<Entry, Skipped>>,
    breaks_at: Option<u64>,
}

impl Corpus for Made {
    fn identity(&self) -> String {
        format!("{} made entries", self.entries.len())
    }

    fn n_entries(&self) -> Option<u64> {
        Some(self.entries.len() as u64)
    }

    fn entries(&self, first: u64) -> grpo::Result<Entries<'_>> {
        let end = self.breaks_at.unwrap_or(u64::MAX);
        Ok(Box::new((first..).zip(self.entries.iter().skip(first as usize)).map(move |(at, entry)| match at == end {
            true => Err(Error::config("the power went off")),
            false => Ok(entry.clone()),
        })))
    }
}

fn picture(seed: u64, width: u32, height: u32) -> RgbImage {
    let mut draws = Seed::new(seed).draws();
    let [a, b, c] = [(); 3].map(|()| draws.below(200) as u32);
    RgbImage::from_fn(width, height, |x, y| image::Rgb([(x * 3 + a) as u8, (y * 2 + b) as u8, ((x + y) + c) as u8]))
}

fn encoded(image: &RgbImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

fn entry(name: &str, content: Content, lines: &[&str]) -> Result<Entry, Skipped> {
    let caption = Caption { lines: lines.iter().map(|line| (*line).to_string()).collect() };
    Ok(Entry { name: name.into(), content, caption })
}

fn png(name: &str, seed: u64, size: (u32, u32)) -> Result<Entry, Skipped> {
    let bytes = encoded(&picture(seed, size.0, size.1), ImageFormat::Png);
    entry(name, Content::Encoded(bytes), &[&format!("picture {seed}"), &format!("a long line on picture {seed}")])
}

/// Twenty good pictures, with one damaged and one twice.
fn corpus(breaks_at: Option<u64>) -> Made {
    let mut entries: Vec<_> = (0..20).map(|at| png(&format!("{at}"), at, (64 + at as u32 * 3, 64))).collect();
    let cut = encoded(&picture(7, 64, 64), ImageFormat::Png).into_iter().take(200).collect();
    entries.insert(7, entry("broken", Content::Encoded(cut), &["a broken one"]));
    entries.insert(13, png("twice", 4, (64 + 4 * 3, 64)));
    Made { entries, breaks_at }
}

fn settings() -> Settings {
    Settings {
        height: 64,
        width: 64,
        transparency: Transparency::default(),
        columns: Columns::default(),
        filter: Filter::default(),
        max_bad_share: 0.1,
        rows_per_shard: 6,
    }
}

fn cosmos() -> Cosmos {
    shapes_cosmos(&Device::Cpu).unwrap()
}

fn make(corpus: &Made, settings: &Settings, folder: &Path, (n, batch): (usize, usize)) -> grpo::Result<Manifest> {
    tokenise((corpus, settings), &cosmos(), folder, Workers { n, batch }, |_| {})
}

/// Every file of a folder.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    entries
        .map(|entry| (entry.file_name().to_string_lossy().into_owned(), std::fs::read(entry.path()).unwrap()))
        .collect()
}

#[test]
fn tokens_are_the_same_whoever_made_them_and_however_often_it_broke() {
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole");
    let manifest = make(&corpus(None), &settings(), &whole, (1, 4)).unwrap();
    assert_eq!((manifest.n_rows, manifest.n_read, manifest.complete), (20, 22, true));
    let skipped = BTreeMap::from([("damaged_picture".to_string(), 1), ("duplicate".to_string(), 1)]);
    assert_eq!(manifest.skipped, skipped);
    let expected = files(&whole);
    assert_eq!(expected.len(), 4 + 2, "{:?}", expected.keys());

    for (workers, batch) in [(1, 1), (3, 4), (2, 32)] {
        let again = folder.path().join(format!("{workers}-{batch}"));
        make(&corpus(None), &settings(), &again, (workers, batch)).unwrap();
        assert!(files(&again) == expected, "{workers} workers, batches of {batch}");
    }
    for breaks_at in 0..22 {
        let broken = folder.path().join(format!("broken-{breaks_at}"));
        let error = make(&corpus(Some(breaks_at)), &settings(), &broken, (2, 4)).unwrap_err();
        assert!(error.to_string().contains("the power went off"), "{error}");
        // A shard that was written and not yet listed, as a kill between the two leaves it.
        std::fs::write(broken.join("00003.safetensors"), "half a shard").unwrap();
        std::fs::write(broken.join("00002.safetensors.partial"), "half a shard").unwrap();
        make(&corpus(None), &settings(), &broken, (2, 4)).unwrap();
        std::fs::remove_file(broken.join("00002.safetensors.partial")).ok();
        assert!(files(&broken) == expected, "broken at {breaks_at}");
    }
}

#[test]
fn rows_are_what_was_written() {
    let folder = tempfile::tempdir().unwrap();
    make(&corpus(None), &settings(), folder.path(), (2, 4)).unwrap();
    TokenSet::verify(&[folder.path()]).unwrap();
    let set = TokenSet::open(&[folder.path(), folder.path()]).unwrap();
    assert_eq!((set.len(), set.grid(), set.n_codes()), (40, (8, 8), 1600));
    let (cropped, skipped) = pictures((&corpus(None), &settings()), 100, 2).unwrap();
    assert_eq!(skipped.len(), 2);
    let cosmos = cosmos();
    for (at, index) in [(0usize, 0usize), (5, 5), (6, 6), (19, 19), (0, 20), (19, 39)] {
        let of = cropped.get(at).unwrap();
        let codes: Vec<u32> = set.row(index).unwrap().codes.iter().map(|code| u32::from(*code)).collect();
        assert_eq!(codes, cosmos.encode(&[of]).unwrap()[0], "row {index}");
        assert_eq!(set.row(index).unwrap().lines, [format!("picture {at}"), format!("a long line on picture {at}")]);
    }
    assert!(set.row(40).unwrap_err().to_string().contains("there is no row 40; the tokens have 40"));
}

#[test]
fn every_bad_entry_is_counted_by_its_reason() {
    let jpeg = encoded(&picture(1, 96, 96), ImageFormat::Jpeg);
    let codes = |codes: Vec<u16>, grid| Content::Codes { codes, grid };
    let mut bomb = encoded(&picture(1, 64, 64), ImageFormat::Png);
    // IHDR says 60,000 x 60,000 pixels, with its checksum.
    bomb[16..24].copy_from_slice(&[0, 0, 0xEA, 0x60, 0, 0, 0xEA, 0x60]);
    let crc = crc32(&bomb[12..29]);
    bomb[29..33].copy_from_slice(&crc.to_be_bytes());
    let small = Settings {
        filter: Filter { min_short_edge: 70, max_aspect: 2.0, max_words: 4, ..Filter::default() },
        ..settings()
    };
    let said = ["some words"];
    let cases = [
        (entry("short edge", Content::Encoded(encoded(&picture(2, 69, 90), ImageFormat::Png)), &said), "short_edge"),
        (entry("aspect", Content::Encoded(encoded(&picture(3, 80, 170), ImageFormat::Png)), &said), "aspect"),
        (entry("words", Content::Encoded(jpeg.clone()), &["one two three four five"]), "caption_words"),
        (entry("nothing", Content::Encoded(jpeg.clone()), &["", " "]), "empty_caption"),
        (entry("cut", Content::Encoded(jpeg[..jpeg.len() * 2 / 3].to_vec()), &said), "damaged_picture"),
        (entry("no picture", Content::Encoded(b"<html>404</html>".to_vec()), &said), "unknown_picture"),
        (entry("bomb", Content::Encoded(bomb), &said), "too_large"),
        (entry("few codes", codes(vec![1; 63], (9, 7)), &said), "wrong_codes"),
        (entry("beyond", codes([vec![1; 63], vec![1600]].concat(), (8, 8)), &said), "wrong_codes"),
        (
            Err(Skipped { name: "gone".into(), reason: Reason::UnreadableFile, message: "gone".into() }),
            "unreadable_file",
        ),
    ];
    for (case, reason) in cases {
        let name = case.as_ref().map_or_else(|skipped| skipped.name.clone(), |entry| entry.name.clone());
        let good = entry("good", Content::Encoded(encoded(&picture(5, 90, 90), ImageFormat::Png)), &said);
        let made = Made { entries: vec![good, case], breaks_at: None };
        let folder = tempfile::tempdir().unwrap();
        let manifest = make(&made, &small, folder.path(), (2, 4));
        let manifest = manifest.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!((manifest.n_rows, manifest.skipped), (1, BTreeMap::from([(reason.to_string(), 1)])), "{name}");
        let told = std::fs::read_to_string(folder.path().join("skipped.jsonl")).unwrap();
        let told: serde_json::Value = serde_json::from_str(&told).unwrap();
        assert_eq!((told["name"].as_str().unwrap(), told["reason"].as_str().unwrap()), (name.as_str(), reason));
        assert!(told["message"].as_str().unwrap().len() > 3, "{told}");
    }
    let given = entry("codes", codes((0..64).collect(), (8, 8)), &said);
    let folder = tempfile::tempdir().unwrap();
    make(&Made { entries: vec![given], breaks_at: None }, &settings(), folder.path(), (1, 1)).unwrap();
    assert_eq!(TokenSet::open(&[folder.path()]).unwrap().row(0).unwrap().codes, (0..64).collect::<Vec<u16>>());
}

/// PNG's checksum.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xEDB8_8320 } else { crc >> 1 })
    })
}

#[test]
fn too_many_bad_entries_end_the_reading_and_lose_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut made = corpus(None);
    made.entries.push(entry("bad again", Content::Encoded(b"nothing".to_vec()), &["nothing"]));
    let strict = Settings { max_bad_share: 0.001, ..settings() };
    let error = make(&made, &strict, folder.path(), (2, 4)).unwrap_err().to_string();
    for words in ["2 of 23 entries could not be used", "max_bad_share", "damaged_picture", "skipped.jsonl", "--resume"]
    {
        assert!(error.contains(words), "no `{words}` in {error}");
    }
    assert_eq!(Manifest::read(folder.path()).unwrap().n_rows, 18);
    let error = TokenSet::open(&[folder.path()]).unwrap_err().to_string();
    assert!(error.contains("not yet the whole corpus"), "{error}");
    // A cap is no part of what the tokens are.
    let manifest = make(&made, &settings(), folder.path(), (2, 4)).unwrap();
    assert_eq!((manifest.n_rows, manifest.n_skipped()), (20, 3));
}

#[test]
fn a_folder_of_another_run_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    make(&corpus(None), &settings(), folder.path(), (2, 4)).unwrap();
    let check = |made: &Made, settings: &Settings, words: &str| {
        let error = make(made, settings, folder.path(), (2, 4)).unwrap_err().to_string();
        assert!(error.contains("holds tokens of another run") && error.contains(words), "{error}");
    };
    let other = Filter { drop_duplicates: false, ..Filter::default() };
    check(
        &corpus(None),
        &Settings { filter: other, ..settings() },
        "there drop_duplicates = true, here drop_duplicates = false",
    );
    check(&corpus(None), &Settings { height: 128, ..settings() }, "there grid (8, 8)");
    let mut more = corpus(None);
    more.entries.push(png("one more", 99, (64, 64)));
    check(&more, &settings(), "there corpus 22 made entries, here corpus 23 made entries");
}

#[test]
fn damage_is_named_with_its_file_and_row() {
    let folder = tempfile::tempdir().unwrap();
    make(&corpus(None), &settings(), folder.path(), (2, 4)).unwrap();
    let shard = folder.path().join("00001.safetensors");
    let bytes = std::fs::read(&shard).unwrap();
    let open = || TokenSet::open(&[folder.path()]);
    let all = |set: &TokenSet| (0..set.len()).map(|row| set.row(row)).find_map(Result::err);

    // A bit of a code, and one of a letter of a caption.
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let tensors: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let at = |name: &str| 8 + header + tensors[name]["data_offsets"][0].as_u64().unwrap() as usize;
    for place in [at("codes") + 2 * 64 * 3, at("captions") + 5, at("checks") + 4] {
        let mut damaged = bytes.clone();
        damaged[place] ^= 1;
        std::fs::write(&shard, damaged).unwrap();
        let error = all(&open().unwrap()).unwrap().to_string();
        assert!(error.contains("00001.safetensors") && error.contains("is damaged"), "{error}");
        let error = TokenSet::verify(&[folder.path()]).unwrap_err().to_string();
        assert!(error.contains("00001.safetensors") && error.contains("checksum"), "{error}");
    }
    std::fs::write(&shard, &bytes[..bytes.len() - 1]).unwrap();
    let error = open().unwrap_err().to_string();
    assert!(error.contains("00001.safetensors") && error.contains("it is not whole"), "{error}");
    std::fs::remove_file(&shard).unwrap();
    assert!(open().unwrap_err().to_string().contains("00001.safetensors"));
}

/// Every byte of a shard's header and of its offsets, changed: an error or the same rows, and no panic.
#[test]
fn a_shard_with_any_changed_byte_is_no_panic() {
    let folder = tempfile::tempdir().unwrap();
    make(&corpus(None), &settings(), folder.path(), (2, 4)).unwrap();
    let shard = folder.path().join("00000.safetensors");
    let bytes = std::fs::read(&shard).unwrap();
    let rows = |set: &TokenSet| (0..set.len()).map(|row| set.row(row).ok()).collect::<Vec<_>>();
    let whole = rows(&TokenSet::open(&[folder.path()]).unwrap());
    let mut draws = Seed::new(3).draws();
    let places = (0..700).chain((0..300).map(|_| draws.below(bytes.len()))).collect::<Vec<_>>();
    for place in places {
        let mut damaged = bytes.clone();
        damaged[place] ^= 1 << (place % 8);
        std::fs::write(&shard, damaged).unwrap();
        let Ok(set) = TokenSet::open(&[folder.path()]) else { continue };
        for (row, expected) in rows(&set).into_iter().zip(&whole) {
            assert!(row.is_none() || row == *expected, "another row at byte {place}");
        }
    }
}

#[test]
fn manifests_that_lead_elsewhere_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    make(&corpus(None), &settings(), folder.path(), (2, 4)).unwrap();
    let path = folder.path().join(MANIFEST);
    let text = std::fs::read_to_string(&path).unwrap();
    let check = |change: &dyn Fn(&str) -> String, words: &str| {
        std::fs::write(&path, change(&text)).unwrap();
        let error = Manifest::read(folder.path()).unwrap_err().to_string();
        assert!(error.contains(words) && error.contains(MANIFEST), "{error}");
    };
    check(
        &|text| text.replace("00001.safetensors", "../00001.safetensors"),
        "a shard is called `../00001.safetensors`",
    );
    check(&|text| text.replace("grpo-tokens-1", "grpo-tokens-9"), "this version reads `grpo-tokens-1`");
    check(&|text| text.replace("\"n_rows\": 20", "\"n_rows\": 21"), "21 rows in shards of 20");
    check(&|text| text[..text.len() / 2].to_string(), "write the tokens again");
    check(&|text| text.replace("\"complete\"", "\"finished\""), "unknown field `finished`");
}

#[test]
fn every_row_comes_once_an_epoch_and_none_that_is_held_out() {
    let mut order = Order::new(100, 10, Seed::new(5)).unwrap();
    let held_out = order.held_out().to_vec();
    let epoch = |order: &mut Order, n: u64| (0..90).map(|at| order.row(n * 90 + at)).collect::<Vec<_>>();
    let (first, second) = (epoch(&mut order, 0), epoch(&mut order, 1));
    assert_ne!(first, second);
    for seen in [&first, &second] {
        let mut all: Vec<usize> = seen.iter().chain(&held_out).copied().collect();
        all.sort_unstable();
        assert_eq!(all, (0..100).collect::<Vec<_>>());
    }
    // From anywhere, as a resumed run does it.
    let mut again = Order::new(100, 10, Seed::new(5)).unwrap();
    assert_eq!(again.row(133), second[43]);
    assert_eq!(again.row(7), first[7]);
    let mut other = Order::new(100, 10, Seed::new(6)).unwrap();
    assert_eq!(other.held_out(), held_out);
    assert_ne!(epoch(&mut other, 0), first);
    assert!(Order::new(10, 10, Seed::new(0)).unwrap_err().to_string().contains("hold out fewer"));
}

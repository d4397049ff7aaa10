//! The song that goes on for as long as it is fed: what comes out of the player has no seam, and any number of pieces of it is
//! recognised.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{OrTell, assets, skipped};
use umbra_tests::sound::RATE;
use umbra_tests::wav::Wav;
use umbra_tests::wav::analysis::Analysis;

#[test]
fn a_song_in_pieces_has_no_seam_between_its_rounds() {
    if skipped() {
        return;
    }
    let song = assets().song_in_pieces(RATE, 20).or_tell();
    let dir = tempfile::tempdir().unwrap();
    let count = song.pieces.len() * 2 + 3;
    let played = song.played(count, &dir.path().join("played.wav")).or_tell();
    let heard = Wav::read(&played.reference).or_tell();
    let seconds = heard.frames.len() as f64 / f64::from(RATE);
    let expected = 2.0 * 20.0 + 3.0 * 2.0;
    assert!((seconds - expected).abs() < 0.5, "{seconds} s of {expected}");
    let analysis = Analysis::of(&heard, &heard);
    assert_eq!((analysis.lost, analysis.doubled, analysis.unknown), (0, 0, 0), "{:?}", analysis.pieces);
    assert_eq!(analysis.pieces.len(), 1);
    assert!(analysis.silences.is_empty(), "{:?}", analysis.silences);

    // A crash in the second round, in which 1 s is lost, and whose buffer of 200 ms is heard again.
    let crash = heard.frames.len() / 2;
    let (again, lost) = (RATE as usize / 5, RATE as usize);
    let silence = vec![[0, 0]; lost];
    let parts =
        [&heard.frames[..crash], &heard.frames[crash - again..crash], &silence[..], &heard.frames[crash + lost..]];
    let analysis = Analysis::of(&Wav { rate: RATE, frames: parts.concat() }, &heard);
    assert_eq!((analysis.lost, analysis.doubled, analysis.unknown), (lost, again, 0), "{:?}", analysis.pieces);
    assert_eq!((analysis.silences.len(), analysis.unheard_ends), (1, (0, 0)));
}

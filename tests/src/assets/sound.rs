//! What sound scenarios play with, from the distribution: mpg123, alsa-utils and what they need, as an archive that
//! is put behind any initramfs; PulseAudio as another.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use umbra_guest_images::cache::Cache;

use super::AssetError;
use super::programs::archive_of;

/// What the archives are made by.
const RECIPE: &str = include_str!("sound.rs");

/// The player itself; the distribution's `mpg123` is a script that says `-o alsa`.
const PLAYER: &str = "/usr/bin/mpg123.bin";
/// Where that script is, and the player where it is none.
pub(super) const PLAYER_COMMAND: &str = "/usr/bin/mpg123";
/// Other programs: `arecord` is a link to `aplay`.
const PROGRAMS: [&str; 3] = ["/usr/bin/aplay", "/usr/bin/amixer", "/usr/bin/speaker-test"];
/// The player's output to ALSA, below the library folder.
const OUTPUT: &str = "mpg123/output_alsa.so";
/// alsa-lib's configuration, but for what concerns machines of this or that make.
const CONFIGURATION: &str = "/usr/share/alsa";
const CONFIGURATION_PARTS: [&str; 4] = ["alsa.conf", "cards", "pcm", "ctl"];

/// The sound server, and the player that speaks to it.
const SERVER_PROGRAMS: [&str; 2] = ["/usr/bin/pulseaudio", "/usr/bin/paplay"];
/// Its modules: the card, the players' socket, and what both load.
const SERVER_MODULES: [&str; 4] =
    ["module-alsa-sink.so", "module-native-protocol-unix.so", "libalsa-util.so", "libprotocol-native.so"];

/// The archive with the programs.
pub(super) fn programs(cache: &Cache) -> Result<PathBuf, AssetError> {
    let player = if Path::new(PLAYER).exists() { PLAYER } else { PLAYER_COMMAND };
    let all: Vec<_> = PROGRAMS.into_iter().chain([player]).collect();
    archive_of(cache, ("sound", RECIPE), &all, |archive| {
        if player == PLAYER {
            archive.add_host_file(Path::new(PLAYER_COMMAND), PLAYER_COMMAND)?;
        }
        archive.add_symlink("usr/bin/arecord", "aplay");
        // dmix, which alsa-lib puts before some cards, wants this group.
        archive.add_file("etc/group", 0o644, "root:x:0:\naudio:x:29:\n");
        let output = library_folder().join(OUTPUT);
        archive.add_program(&output)?;
        for part in CONFIGURATION_PARTS {
            let from = Path::new(CONFIGURATION).join(part);
            let to = from.display().to_string();
            if from.is_dir() {
                archive.add_host_dir(&from, &to)?;
            } else if from.is_file() {
                archive.add_host_file(&from, &to)?;
            }
        }
        Ok(())
    })
}

/// The archive with the sound server.
pub(super) fn server(cache: &Cache) -> Result<PathBuf, AssetError> {
    archive_of(cache, ("pulseaudio", RECIPE), &SERVER_PROGRAMS, |archive| {
        let modules = server_modules()?;
        for module in SERVER_MODULES {
            archive.add_program(&modules.join(module))?;
        }
        Ok(())
    })
}

/// The folder of the server's modules, which has its version in its name.
fn server_modules() -> Result<PathBuf, AssetError> {
    let mut command = Command::new(SERVER_PROGRAMS[0]);
    let said = run(command.arg("--dump-conf"))?;
    let folder = said.lines().find_map(|line| line.strip_prefix("dl-search-path = "));
    folder.map(PathBuf::from).ok_or_else(|| failed(&command, "it names no folder of modules".into()))
}

/// `/usr/lib` or the folder of the architecture below it.
fn library_folder() -> PathBuf {
    let multiarch = Path::new("/usr/lib/x86_64-linux-gnu");
    if multiarch.join(OUTPUT).exists() { multiarch.into() } else { "/usr/lib".into() }
}

pub(super) fn failed(command: &Command, what: String) -> AssetError {
    AssetError::Program { command: format!("{command:?}"), what }
}

/// What it printed.
pub(super) fn run(command: &mut Command) -> Result<String, AssetError> {
    let output = command.stdin(Stdio::null()).output();
    let output = output.map_err(|error| failed(command, error.to_string()))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(failed(command, String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

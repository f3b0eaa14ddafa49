//! Finds the Debian mirror of this machine in its own apt configuration.
//!
//! No host name is known here: the mirror is the URI under which the machine's configuration lists
//! its own release. Both forms are read, one-line entries (`sources.list`) and deb822 stanzas
//! (`*.sources`), see sources.list(5).

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The keyring that Debian's `debian-archive-keyring` package installs; every Debian system has it.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The machine's Debian release and where its packages come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Debian {
    /// Code name of the release, such as `bookworm`.
    pub codename: String,
    /// Base URI of the mirror.
    pub mirror: String,
}

impl Debian {
    /// Reads `/etc/os-release` and the apt configuration.
    pub fn of_this_machine() -> Result<Debian> {
        let release = fs::read_to_string("/etc/os-release")
            .context("/etc/os-release cannot be read: packages are taken from Debian only")?;
        let (id, codename) = parse_os_release(&release);
        if id != "debian" {
            bail!(
                "/etc/os-release: expected ID=debian, found {id:?}: packages are fetched from a \
                 Debian mirror only; run this on Debian 12 or newer, or in a container of it"
            );
        }
        let Some(codename) = codename else {
            bail!("/etc/os-release: VERSION_CODENAME is missing, so the Debian release is unknown");
        };
        let mut texts = Vec::new();
        for path in source_files()? {
            let text = fs::read_to_string(&path)
                .with_context(|| format!("{}: cannot be read", path.display()))?;
            texts.push((path.extension().is_some_and(|e| e == "sources"), text));
        }
        let listed: Vec<(String, Vec<String>)> = texts
            .iter()
            .flat_map(|(deb822, text)| {
                if *deb822 {
                    stanzas(text)
                } else {
                    entries(text)
                }
            })
            .filter(|(uri, _)| !uri.starts_with("cdrom:"))
            .collect();
        // A machine that follows "stable" or "testing" does not list its code name; then the path
        // of the main archive tells.
        let mirror = listed
            .iter()
            .find(|(_, suites)| suites.iter().any(|suite| suite == &codename))
            .or_else(|| {
                listed
                    .iter()
                    .find(|(uri, _)| uri.trim_end_matches('/').ends_with("/debian"))
            })
            .map(|(uri, _)| uri.clone())
            .with_context(|| {
                format!(
                    "/etc/apt: no entry for {codename} was found; add a Debian mirror to \
                     /etc/apt/sources.list"
                )
            })?;
        Ok(Debian { codename, mirror })
    }

    /// One line of a sources.list that gives the main component of `suite` from this mirror.
    pub fn source_line(&self, suite: &str) -> String {
        let signed = if Path::new(KEYRING).exists() {
            format!("[signed-by={KEYRING}] ")
        } else {
            String::new()
        };
        format!("deb {signed}{} {suite} main\n", self.mirror)
    }
}

/// `ID` and `VERSION_CODENAME` of an os-release(5) file.
fn parse_os_release(text: &str) -> (String, Option<String>) {
    let value = |key: &str| {
        text.lines()
            .filter_map(|line| line.split_once('='))
            .find(|(name, _)| *name == key)
            .map(|(_, value)| value.trim_matches(['"', '\'']).to_owned())
    };
    (value("ID").unwrap_or_default(), value("VERSION_CODENAME"))
}

/// The machine's source lists, the main one first.
fn source_files() -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let main = PathBuf::from("/etc/apt/sources.list");
    if main.exists() {
        files.push(main);
    }
    if let Ok(parts) = fs::read_dir("/etc/apt/sources.list.d") {
        let mut parts: Vec<PathBuf> = parts
            .filter_map(|entry| entry.ok().map(|entry| entry.path()))
            .filter(|path| {
                path.extension()
                    .is_some_and(|e| e == "list" || e == "sources")
            })
            .collect();
        parts.sort();
        files.append(&mut parts);
    }
    if files.is_empty() {
        bail!("/etc/apt: no sources.list and no *.sources file; is apt installed?");
    }
    Ok(files)
}

/// `(URI, suites)` of every binary-package entry in the one-line format.
fn entries(text: &str) -> Vec<(String, Vec<String>)> {
    text.lines()
        .filter_map(|line| {
            let rest = line
                .split('#')
                .next()?
                .trim()
                .strip_prefix("deb ")?
                .trim_start();
            let rest = match rest.strip_prefix('[') {
                Some(options) => options.split_once(']')?.1,
                None => rest,
            };
            let mut words = rest.split_whitespace();
            Some((words.next()?.to_owned(), vec![words.next()?.to_owned()]))
        })
        .collect()
}

/// `(URI, suites)` of every enabled binary-package stanza in the deb822 format.
fn stanzas(text: &str) -> Vec<(String, Vec<String>)> {
    let mut found = Vec::new();
    let uncommented: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    for stanza in uncommented.split(|line| line.trim().is_empty()) {
        let field = |name: &str| -> Vec<String> {
            let mut words = Vec::new();
            let mut inside = false;
            for line in stanza {
                if line.starts_with([' ', '\t']) {
                    if inside {
                        words.extend(line.split_whitespace().map(str::to_owned));
                    }
                    continue;
                }
                inside = false;
                if let Some((key, value)) = line.split_once(':')
                    && key.eq_ignore_ascii_case(name)
                {
                    inside = true;
                    words.extend(value.split_whitespace().map(str::to_owned));
                }
            }
            words
        };
        let enabled = !field("Enabled")
            .iter()
            .any(|word| word.eq_ignore_ascii_case("no"));
        if enabled && field("Types").iter().any(|word| word == "deb") {
            let suites = field("Suites");
            found.extend(field("URIs").into_iter().map(|uri| (uri, suites.clone())));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::{entries, parse_os_release, stanzas};

    #[test]
    fn one_line_entries_with_and_without_options() {
        let text = "# deb http://a/debian old main\n\
                    deb-src http://a/debian bookworm main\n\
                    deb [arch=amd64 signed-by=/k.gpg] http://b/debian bookworm main contrib # x\n\
                    deb http://c/debian trixie main\n";
        assert_eq!(
            entries(text),
            [
                ("http://b/debian".to_owned(), vec!["bookworm".to_owned()]),
                ("http://c/debian".to_owned(), vec!["trixie".to_owned()]),
            ]
        );
    }

    #[test]
    fn deb822_stanzas_with_comments_continuations_and_disabled_ones() {
        let text = "Types: deb\n# a comment inside\nURIs: http://a/debian\n\
                    Suites: bookworm\n bookworm-updates\nComponents: main\n\n\
                    Types: deb\nURIs: http://b/debian\nSuites: bookworm\nEnabled: no\n\n\
                    Types: deb-src\nURIs: http://c/debian\nSuites: bookworm\n";
        assert_eq!(
            stanzas(text),
            [(
                "http://a/debian".to_owned(),
                vec!["bookworm".to_owned(), "bookworm-updates".to_owned()]
            )]
        );
    }

    #[test]
    fn os_release_values_lose_their_quotes() {
        let text =
            "PRETTY_NAME=\"Debian\"\nVERSION_ID=\"12\"\nVERSION_CODENAME=bookworm\nID=debian\n";
        assert_eq!(
            parse_os_release(text),
            ("debian".to_owned(), Some("bookworm".to_owned()))
        );
        assert_eq!(
            parse_os_release("ID=\"ubuntu\"\n"),
            ("ubuntu".to_owned(), None)
        );
    }
}

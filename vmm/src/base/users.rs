//! Users of the host, as its file of users has them (passwd(5)). The C library's own search would load libraries, which a static
//! program has not.

use std::fmt;
use std::io;
use std::path::Path;
use std::str::FromStr;

/// The host's file of users.
pub const USERS: &str = "/etc/passwd";

/// A user's numbers. Its text is `UID:GID`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    /// The user's.
    pub uid: u32,
    /// Its group's.
    pub gid: u32,
}

impl User {
    /// The user `name` of the file `users`.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn find(users: &Path, name: &str) -> io::Result<Option<Self>> {
        let text = std::fs::read_to_string(users)?;
        Ok(text.lines().find_map(|line| {
            let mut fields = line.split(':');
            (fields.next() == Some(name)).then(|| fields.nth(1).zip(fields.next()))?.and_then(numbers)
        }))
    }
}

fn numbers((uid, gid): (&str, &str)) -> Option<User> {
    Some(User { uid: uid.parse().ok()?, gid: gid.parse().ok()? })
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.uid, self.gid)
    }
}

impl FromStr for User {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.split_once(':').and_then(numbers).ok_or("a user's numbers are written UID:GID")
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_found_by_its_name_and_told_by_its_numbers() {
        let users = tempfile::NamedTempFile::new().unwrap();
        let text =
            "root:x:0:0:root:/root:/bin/sh\numbra-vm:x:987:986::/nonexistent:/usr/sbin/nologin\nodd:x\nbad:x:1:y:\n";
        std::fs::write(&users, text).unwrap();
        let found = |name| User::find(users.path(), name).unwrap();
        assert_eq!(found("umbra-vm"), Some(User { uid: 987, gid: 986 }));
        for none in ["umbra", "odd", "bad", ""] {
            assert_eq!(found(none), None, "{none}");
        }
        assert_eq!(User::find(Path::new("/no/such/file"), "root").unwrap_err().kind(), io::ErrorKind::NotFound);
        let user = found("umbra-vm").unwrap();
        assert_eq!(user.to_string().parse(), Ok(user));
        for wrong in ["987", "987:", ":986", "a:b", "-1:2", "1:2:3"] {
            assert!(wrong.parse::<User>().is_err(), "{wrong}");
        }
    }
}

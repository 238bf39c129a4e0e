//! Names that come from the host and become names of files.

use anyhow::ensure;

use crate::containers::Error;

/// Longest id of a container or an exec, in bytes.
const MAX_ID: usize = 200;

/// Checks the id of a container or an exec.
///
/// # Errors
/// What is allowed.
pub fn check_id(id: &str) -> Result<(), Error> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if id.is_empty() || id.len() > MAX_ID || id.starts_with('.') || !id.chars().all(plain) {
        return Err(Error::Invalid(format!(
            "id {id:?}: allowed are 1 to {MAX_ID} letters, digits, '-', '_' and '.', not beginning with '.'"
        )));
    }
    Ok(())
}

/// Checks that a path of this name within a folder is in that folder.
///
/// # Errors
/// When it may be elsewhere.
pub fn check_file_name(name: &str) -> anyhow::Result<()> {
    ensure!(!name.is_empty() && !name.contains(['/', '\0']) && !matches!(name, "." | ".."), "{name:?} is no plain name");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_leads_elsewhere_is_refused() {
        for name in ["", ".", "..", "a/b", "/", "../a", "a\0"] {
            assert!(check_file_name(name).is_err() && check_id(name).is_err(), "{name:?}");
        }
        assert!(check_file_name("..2026_11_23").is_ok());
    }

    #[test]
    fn an_id_that_is_no_plain_name_is_refused() {
        for id in ["", ".", "..", "a/b", "a b", "\n", &"x".repeat(201)] {
            assert!(check_id(id).is_err(), "{id:?}");
        }
        for id in ["web", "a-b_c.d", &"x".repeat(200)] {
            assert!(check_id(id).is_ok(), "{id:?}");
        }
    }
}

//! Reads the configuration's files: `config.toml`, then the drop-ins beside it in sorted order.

use std::io;
use std::path::Path;

use caisson_protocol::config::{Config, ConfigError};

use crate::users;

/// A configuration that cannot be used, in one sentence.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// A file that is there but cannot be read.
    #[error("read configuration {path}")]
    Read {
        /// File or folder.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// A handler's file that moves the run folder.
    #[error("configuration {path}: run.dir is for all handlers of the host; set it in /etc/caisson/config.toml")]
    RunDir {
        /// The file.
        path: String,
    },
    /// A key or value that is not allowed.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// The effective configuration of the file `path` and of `<path>.d/*.toml`; both may be absent. In a user namespace the
/// defaults are those that suit one.
///
/// # Errors
/// When a file that exists cannot be read or holds something that is not allowed.
pub fn load(path: &Path) -> Result<Config, SettingsError> {
    let read_error = |path: &Path, source| SettingsError::Read { path: path.display().to_string(), source };
    let mut config = if users::are_few() { Config::rootless() } else { Config::default() };
    let mut files = vec![path.to_owned()];
    let mut drop_ins = path.as_os_str().to_owned();
    drop_ins.push(".d");
    let drop_ins = Path::new(&drop_ins);
    match std::fs::read_dir(drop_ins) {
        Ok(entries) => {
            let mut found = Vec::new();
            for entry in entries {
                let entry = entry.map_err(|error| read_error(drop_ins, error))?.path();
                if entry.extension().is_some_and(|extension| extension == "toml") {
                    found.push(entry);
                }
            }
            found.sort();
            files.extend(found);
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(read_error(drop_ins, error)),
    }
    for file in files {
        match std::fs::read_to_string(&file) {
            Ok(text) => config.apply_toml(&file.display().to_string(), &text)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(read_error(&file, error)),
        }
    }
    Ok(config)
}

/// The effective configuration for the pods of a runtime handler that has a file of its own, which comes
/// after those of the host.
///
/// # Errors
/// As [`load`], and when the handler's file does not exist or moves the run folder, where whoever
/// does not know the handler looks for its pods.
pub fn load_for(path: &Path, handler: Option<&Path>) -> Result<Config, SettingsError> {
    let mut config = load(path)?;
    if let Some(handler) = handler {
        lay_over(&mut config, handler)?;
    }
    Ok(config)
}

/// Lays the file of a tenant over a configuration: `tenants/NAME.toml` beside that of the host.
///
/// # Errors
/// As [`load_for`] for a handler's.
pub fn lay_tenant(config: &mut Config, path: &Path, tenant: &str) -> Result<(), SettingsError> {
    lay_over(config, &path.with_file_name("tenants").join(format!("{tenant}.toml")))
}

fn lay_over(config: &mut Config, file: &Path) -> Result<(), SettingsError> {
    let name = file.display().to_string();
    let run_dir = config.run_dir.clone();
    let text = std::fs::read_to_string(file).map_err(|source| SettingsError::Read { path: name.clone(), source })?;
    config.apply_toml(&name, &text)?;
    if config.run_dir == run_dir { Ok(()) } else { Err(SettingsError::RunDir { path: name }) }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn drop_ins_apply_in_sorted_order_over_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        std::fs::write(&path, "[vm]\nvcpus = 2\nmemory_mib = 128\n").unwrap();
        std::fs::create_dir(dir.path().join("config.toml.d")).unwrap();
        std::fs::write(dir.path().join("config.toml.d/20.toml"), "[vm]\nvcpus = 4\n").unwrap();
        std::fs::write(dir.path().join("config.toml.d/10.toml"), "[vm]\nvcpus = 3\n").unwrap();
        std::fs::write(dir.path().join("config.toml.d/99.bak"), "nonsense").unwrap();
        let config = load(&path).unwrap();
        assert_eq!((config.vcpus, config.memory_mib), (4, 128));
    }

    #[test]
    fn a_handlers_file_comes_last_and_leaves_the_run_folder_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (path, handler) = (dir.path().join("config.toml"), dir.path().join("acme.toml"));
        std::fs::write(&path, "[vm]\nvcpus = 2\nmemory_mib = 128\n").unwrap();
        assert!(load_for(&path, Some(&handler)).unwrap_err().to_string().contains("acme.toml"));
        std::fs::write(&handler, "[vm]\nvcpus = 4\n").unwrap();
        let config = load_for(&path, Some(&handler)).unwrap();
        assert_eq!((config.vcpus, config.memory_mib, load_for(&path, None).unwrap().vcpus), (4, 128, 2));
        std::fs::write(&handler, "[run]\ndir = \"/elsewhere\"\n").unwrap();
        assert!(load_for(&path, Some(&handler)).unwrap_err().to_string().contains("run.dir"));
    }

    #[test]
    fn a_tenants_file_comes_after_the_handlers() {
        let dir = tempfile::tempdir().unwrap();
        let (path, handler) = (dir.path().join("config.toml"), dir.path().join("handler.toml"));
        std::fs::write(&path, "[annotations]\nallowed = [\"tenant.name\"]\n").unwrap();
        std::fs::write(&handler, "[vm]\nvcpus = 2\nmemory_mib = 128\n[tenant]\nname = \"acme\"\n").unwrap();
        std::fs::create_dir(dir.path().join("tenants")).unwrap();
        std::fs::write(dir.path().join("tenants/umbra.toml"), "[vm]\nvcpus = 4\n[annotations]\nallowed = []\n").unwrap();
        let config = load_for(&path, Some(&handler)).unwrap();
        let mut annotations: BTreeMap<String, String> =
            [("io.caisson.tenant.name", "umbra"), ("other", "kept")].map(|(name, value)| (name.into(), value.into())).into();
        let mut of_nobody = load_for(&path, None).unwrap();
        assert_eq!(of_nobody.take_tenant(&mut annotations.clone()).unwrap(), "umbra");
        let error = config.take_tenant(&mut annotations).unwrap_err().to_string();
        assert!(error.contains("is \"umbra\", and the configuration has the pod belong to \"acme\""), "{error}");
        assert_eq!((annotations.len(), config.take_tenant(&mut annotations).unwrap().as_str()), (1, "acme"));
        lay_tenant(&mut of_nobody, &path, "umbra").unwrap();
        assert_eq!((of_nobody.vcpus, of_nobody.memory_mib), (4, Config::default().memory_mib));
        let error = lay_tenant(&mut of_nobody, &path, "acme").unwrap_err().to_string();
        assert!(error.starts_with("read configuration ") && error.ends_with("/tenants/acme.toml"), "{error}");
        annotations.insert("io.caisson.tenant.name".into(), "umbra".into());
        assert!(of_nobody.take_tenant(&mut annotations).unwrap_err().to_string().contains("tenant.name is not allowed on this host"));
    }

    #[test]
    fn no_file_means_the_defaults() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(load(&dir.path().join("config.toml")).unwrap(), Config::default());
    }
}

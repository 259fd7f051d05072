//! Tuning results for this adapter: a table in memory, and a file.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::Gpu;
use crate::error::Result;
use crate::kernels::{Method, TuningKey};

/// Tuning results, and the folder where they are saved.
#[derive(Default)]
pub struct Tuning(RwLock<Table>);

#[derive(Default)]
struct Table {
    methods: HashMap<TuningKey, Method>,
    folder: Option<PathBuf>,
}

impl Tuning {
    fn read(&self) -> RwLockReadGuard<'_, Table> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }
    fn write(&self) -> RwLockWriteGuard<'_, Table> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Gpu {
    /// The tuning result for calls with this key; [`Method::Auto`] if the default won.
    pub(crate) fn tuned(&self, key: &TuningKey) -> Option<Method> {
        self.0.tuning.read().methods.get(key).copied()
    }

    /// Makes [`Method::Auto`] choose `method` for calls with this key from now on; returns the file that now holds it.
    #[cfg(not(target_arch = "wasm32"))]
    pub(crate) fn keep_tuned(&self, key: TuningKey, method: Method) -> Option<PathBuf> {
        self.0.tuning.write().methods.insert(key, method);
        #[cfg(feature = "tune")]
        if let Some(file) = self.tuning_file() {
            match file::put(&file, &self.0.info, &self.0.capabilities, Some((key, method))) {
                Ok(()) => return Some(file),
                Err(error) => log::warn!("the tuning result is not saved: {}: {error}", file.display()),
            }
        }
        None
    }

    /// The file that holds tuning results: `tuning.json` in the folder named by the environment variable
    /// `WGPU_ATTENTION_CACHE`, else in `wgpu-attention` in the user's cache folder. `None`: in memory only, if the
    /// feature `tune` is off or the variable is empty.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn tuning_file(&self) -> Option<PathBuf> {
        let folder = self.0.tuning.read().folder.clone()?;
        cfg!(feature = "tune").then(|| folder.join("tuning.json"))
    }

    /// Saves tuning results in another folder from now on (`None`: in memory only), and replaces the current results
    /// with those saved there. A file that cannot be read is ignored, with a warning in the log.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn keep_tuning_in(&self, folder: Option<&Path>) {
        {
            let mut table = self.0.tuning.write();
            table.methods.clear();
            table.folder = folder.map(Path::to_path_buf);
        }
        #[cfg(feature = "tune")]
        if let Some(file) = self.tuning_file() {
            let methods = file::get(&file, &self.0.info, &self.0.capabilities);
            self.0.tuning.write().methods = methods;
        }
    }

    /// Deletes the tuning results for this adapter, in memory and in the file.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn clear_tuning(&self) -> Result<()> {
        self.0.tuning.write().methods.clear();
        #[cfg(feature = "tune")]
        if let Some(file) = self.tuning_file().filter(|file| file.exists()) {
            file::put(&file, &self.0.info, &self.0.capabilities, None)
                .map_err(|error| crate::error::Error::File(format!("{}: {error}", file.display())))?;
        }
        Ok(())
    }

    /// Reads the results from the folder that the environment names.
    #[cfg(all(feature = "tune", not(target_arch = "wasm32")))]
    pub(super) fn load_tuning(&self) {
        if let Some(folder) = file::folder() {
            self.keep_tuning_in(Some(&folder));
        }
    }
}

#[cfg(all(feature = "tune", not(target_arch = "wasm32")))]
mod file {
    use std::io::{Error, ErrorKind, Read, Write};

    use serde::{Deserialize, Serialize};

    use super::*;
    use crate::kernels::Capabilities;

    /// This library writes no file larger than this.
    const MOST_BYTES: u64 = 1 << 20;
    /// This many entries stay below that.
    const MOST_ENTRIES: usize = 1000;
    /// Other versions have other kernels.
    const LIBRARY: &str = env!("CARGO_PKG_VERSION");

    #[derive(Default, Serialize, Deserialize)]
    struct File {
        entries: Vec<Entry>,
    }

    #[derive(Serialize, Deserialize)]
    struct Entry {
        library: String,
        adapter: Adapter,
        key: String,
        method: String,
    }

    /// Everything that identifies an adapter.
    #[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
    struct Adapter {
        name: String,
        driver: String,
        driver_info: String,
        backend: String,
        /// The smallest subgroup, where its operations are used.
        subgroup: Option<u32>,
    }

    impl Adapter {
        fn new(info: &wgpu::AdapterInfo, capabilities: &Capabilities) -> Adapter {
            Adapter {
                name: info.name.clone(),
                driver: info.driver.clone(),
                driver_info: info.driver_info.clone(),
                backend: info.backend.to_string(),
                subgroup: capabilities.subgroup_min,
            }
        }
    }

    pub fn folder() -> Option<PathBuf> {
        match std::env::var_os("WGPU_ATTENTION_CACHE") {
            Some(folder) => (!folder.is_empty()).then(|| folder.into()),
            None => {
                use etcetera::BaseStrategy;
                let known = etcetera::choose_base_strategy().ok()?;
                Some(known.cache_dir().join("wgpu-attention"))
            }
        }
    }

    fn read(path: &Path) -> std::io::Result<File> {
        let about = match std::fs::metadata(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(File::default()),
            about => about?,
        };
        // Opening a pipe would wait for its other end.
        if !about.is_file() || about.len() > MOST_BYTES {
            let what = format!("a file of at most {MOST_BYTES} bytes is expected");
            return Err(Error::new(ErrorKind::InvalidData, what));
        }
        let mut bytes = Vec::new();
        std::fs::File::open(path)?.take(MOST_BYTES).read_to_end(&mut bytes)?;
        Ok(serde_json::from_slice(&bytes)?)
    }

    fn known(path: &Path) -> File {
        read(path).unwrap_or_else(|error| {
            log::warn!("saved tuning results are ignored: {}: {error}", path.display());
            File::default()
        })
    }

    /// The results for an adapter in the file.
    pub fn get(path: &Path, info: &wgpu::AdapterInfo, capabilities: &Capabilities) -> HashMap<TuningKey, Method> {
        let adapter = Adapter::new(info, capabilities);
        let mut methods = HashMap::new();
        for entry in known(path).entries {
            if entry.library != LIBRARY || entry.adapter != adapter {
                continue;
            }
            let parsed = entry.key.parse().and_then(|key| {
                let method = entry.method.parse()?;
                if let Method::Tile(tile) = method {
                    tile.check(capabilities)?;
                }
                Ok((key, method))
            });
            match parsed {
                Ok((key, method)) => _ = methods.insert(key, method),
                Err(error) => log::warn!("an entry of {} is ignored: {error}", path.display()),
            }
        }
        methods
    }

    /// Replaces one entry of an adapter, or removes all of them. A concurrent write by another process may be lost, but
    /// the file is never torn.
    pub fn put(
        path: &Path,
        info: &wgpu::AdapterInfo,
        capabilities: &Capabilities,
        found: Option<(TuningKey, Method)>,
    ) -> std::io::Result<()> {
        let folder = path.parent().ok_or(ErrorKind::NotFound)?;
        std::fs::create_dir_all(folder)?;
        let adapter = Adapter::new(info, capabilities);
        let key = found.map(|(key, _)| key.to_string());
        let mut file = known(path);
        file.entries.retain(|entry| {
            let replaced = entry.adapter == adapter && key.as_ref().is_none_or(|key| entry.key == *key);
            entry.library == LIBRARY && !replaced
        });
        if let (Some(key), Some((_, method))) = (key, found) {
            file.entries.push(Entry { library: LIBRARY.into(), adapter, key, method: method.to_string() });
        }
        let surplus = file.entries.len().saturating_sub(MOST_ENTRIES);
        file.entries.drain(..surplus);
        let mut temporary = tempfile::NamedTempFile::new_in(folder)?;
        temporary.write_all(&serde_json::to_vec_pretty(&file)?)?;
        temporary.persist(path).map_err(|error| error.error)?;
        Ok(())
    }
}

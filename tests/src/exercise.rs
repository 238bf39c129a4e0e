//! A program for containers, which does random things with a file and with the names in a folder, and knows what must come
//! of each: `node-tests exercise FOLDER SEED STEPS`. It ends with what differs, the seed and the step; or says what the file
//! holds at last, by a sum that `sum` makes of it, and whether it could be mapped.
#![expect(unsafe_code, reason = "a file that is mapped has no safe wrapper")]

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::ptr;

use rustix::fs::{
    AtFlags, CWD, FallocateFlags, Mode, OFlags, RenameFlags, SeekFrom, copy_file_range, fallocate, linkat, openat, renameat_with, seek,
};
use rustix::io::Errno;
use rustix::mm::{MapFlags, MsyncFlags, ProtFlags, mmap, msync, munmap};

/// The file's name, and the largest that it becomes: more than from where on files are mapped for a guest (`fs.window_mib`).
pub const FILE: &str = "file";
const MOST: usize = 768 << 10;
/// The most bytes that are written or copied at once.
const PIECE: usize = 48 << 10;
const PAGE: usize = 4096;
/// So many names there may be in the folder besides.
const NAMES: u64 = 9;

/// Numbers that look random and are the same for the same seed (SplitMix64).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }

    fn size(&mut self, bound: usize) -> usize {
        self.below(bound as u64) as usize
    }
}

/// A sum of a file's bytes that no other file has by chance (FNV-1a).
pub fn sum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// The program.
pub fn run(folder: &str, seed: u64, steps: u64) {
    let (mut file, mut names) = (Exercised::new(folder.into()), Names::new(folder));
    let mut random = Random(seed);
    for step in 0..steps {
        let what = file.step(&mut random).and_then(|()| names.step(&mut random));
        what.unwrap_or_else(|difference| panic!("seed {seed}, step {step}: {difference}"));
    }
    file.file.sync_all().unwrap();
    println!("{:x} {}", sum(&file.model), if file.mapped { "mapped" } else { "never mapped" });
}

/// Compares; what differs is said.
fn same<T: PartialEq + Debug>(seen: T, expected: T, what: impl FnOnce() -> String) -> Result<(), String> {
    if seen == expected { Ok(()) } else { Err(format!("{}: {seen:?} instead of {expected:?}", what())) }
}

/// A mapping of the file's beginning.
struct Map(*mut u8, usize);

impl Map {
    /// None where nothing is kept of files: what is mapped would have to be.
    fn new(file: &File, length: usize) -> Result<Option<Self>, String> {
        // SAFETY: the kernel chooses the place.
        match unsafe { mmap(ptr::null_mut(), length, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, file, 0) } {
            Ok(start) => Ok(Some(Self(start.cast(), length))),
            Err(Errno::NODEV) => Ok(None),
            Err(error) => Err(format!("map {length} bytes: {error}")),
        }
    }

    fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.1);
        // SAFETY: that is within the mapping, which nobody has a reference into.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.0.add(offset), bytes.len()) };
    }

    fn read(&self, offset: usize, length: usize) -> Vec<u8> {
        assert!(offset + length <= self.1);
        let mut bytes = vec![0; length];
        // SAFETY: that is within the mapping, which nobody has a reference into.
        unsafe { ptr::copy_nonoverlapping(self.0.add(offset), bytes.as_mut_ptr(), length) };
        bytes
    }

    fn sync(&self) {
        // SAFETY: it is the mapping.
        unsafe { msync(self.0.cast(), self.1, MsyncFlags::SYNC) }.unwrap();
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: it is the mapping, which ends here.
        unsafe { munmap(self.0.cast(), self.1) }.unwrap();
    }
}

/// The file, and what it must hold.
struct Exercised {
    path: PathBuf,
    file: File,
    map: Option<Map>,
    mapped: bool,
    model: Vec<u8>,
}

impl Exercised {
    fn new(folder: PathBuf) -> Self {
        let path = folder.join(FILE);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        Self { path, file, map: None, mapped: false, model: Vec::new() }
    }

    fn open(&self, flags: i32) -> File {
        OpenOptions::new().read(true).write(true).custom_flags(flags).open(&self.path).unwrap()
    }

    /// A range of so many bytes at most; beyond the end, too, if the file may grow.
    fn range(&self, random: &mut Random, grows: bool) -> (usize, usize) {
        let end = if grows { MOST } else { self.model.len().max(1) };
        let offset = random.size(end);
        (offset, (1 + random.size(PIECE)).min(end - offset))
    }

    fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.model.resize(self.model.len().max(offset + bytes.len()), 0);
        self.model[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn expected(&self, offset: usize, length: usize) -> &[u8] {
        let end = self.model.len();
        &self.model[offset.min(end)..(offset + length).min(end)]
    }

    /// Compares a range of the file with what it must hold.
    fn check(&self, seen: &[u8], offset: usize, length: usize, how: &str) -> Result<(), String> {
        let expected = self.expected(offset, length);
        same(seen.len(), expected.len(), || format!("{how} of {length} at {offset}, of a file of {}", self.model.len()))?;
        match seen.iter().zip(expected).position(|(seen, expected)| seen != expected) {
            Some(at) => same(seen[at], expected[at], || format!("{how} of {length} at {offset}, the byte at {}", offset + at)),
            None => Ok(()),
        }
    }

    fn read(&self, file: &File, offset: usize, length: usize, how: &str) -> Result<(), String> {
        let mut bytes = vec![0; length];
        let mut read = 0;
        while read < length {
            match file.read_at(&mut bytes[read..], (offset + read) as u64).map_err(|error| format!("{how}: {error}"))? {
                0 => break,
                more => read += more,
            }
        }
        self.check(&bytes[..read], offset, length, how)
    }

    fn step(&mut self, random: &mut Random) -> Result<(), String> {
        match random.below(17) {
            0..=2 => {
                let (offset, length) = self.range(random, true);
                let bytes: Vec<u8> = (0..length).map(|_| random.below(256) as u8).collect();
                let file = if random.below(3) == 0 { self.open(0) } else { self.file.try_clone().unwrap() };
                file.write_all_at(&bytes, offset as u64).map_err(|error| format!("write: {error}"))?;
                self.put(offset, &bytes);
            }
            3 if self.model.len() + PIECE < MOST => {
                let bytes = vec![random.below(256) as u8; 1 + random.size(PIECE)];
                // Where it is to be written is passed over.
                self.open(OFlags::APPEND.bits().cast_signed()).write_all_at(&bytes, 0).map_err(|error| format!("append: {error}"))?;
                self.put(self.model.len(), &bytes);
            }
            3..=5 => {
                let (offset, length) = self.range(random, true);
                let file = if random.below(2) == 0 { self.open(0) } else { self.file.try_clone().unwrap() };
                self.read(&file, offset, length, "read")?;
            }
            6 => {
                let length = random.size(MOST);
                self.file.set_len(length as u64).map_err(|error| format!("cut: {error}"))?;
                self.model.resize(length, 0);
            }
            7 if !self.model.is_empty() => {
                self.map = Map::new(&self.file, self.model.len())?;
                self.mapped |= self.map.is_some();
            }
            7..=10 => self.use_map(random)?,
            11 => self.give_up(random)?,
            12 => self.copy(random)?,
            13 => self.direct(random)?,
            14 => self.holes()?,
            15 => {
                let renamed = self.path.with_file_name(if random.below(2) == 0 { FILE } else { "renamed" });
                std::fs::rename(&self.path, &renamed).map_err(|error| format!("rename: {error}"))?;
                std::fs::rename(&renamed, &self.path).map_err(|error| format!("rename back: {error}"))?;
                self.file = self.open(0);
            }
            _ => {
                self.file.sync_data().map_err(|error| format!("sync: {error}"))?;
                same(self.open(0).metadata().unwrap().len(), self.model.len() as u64, || "length".into())?;
            }
        }
        Ok(())
    }

    /// What is within the file of its mapping is written or read.
    fn use_map(&mut self, random: &mut Random) -> Result<(), String> {
        let Some(map) = self.map.take() else { return Ok(()) };
        let end = map.1.min(self.model.len());
        if end > 0 {
            let offset = random.size(end);
            let length = (1 + random.size(PIECE)).min(end - offset);
            if random.below(2) == 0 {
                let bytes = vec![random.below(256) as u8; length];
                map.write(offset, &bytes);
                self.put(offset, &bytes);
                if random.below(4) == 0 {
                    map.sync();
                }
            } else {
                self.check(&map.read(offset, length), offset, length, "read of what is mapped")?;
            }
        }
        self.map = Some(map);
        Ok(())
    }

    /// Takes a range out of the file, or makes room for one.
    fn give_up(&mut self, random: &mut Random) -> Result<(), String> {
        let (offset, length) = self.range(random, true);
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let how = [hole, FallocateFlags::ZERO_RANGE, FallocateFlags::KEEP_SIZE, FallocateFlags::empty()][random.size(4)];
        match fallocate(&self.file, how, offset as u64, length as u64) {
            Ok(()) => {}
            Err(Errno::OPNOTSUPP) => return Ok(()),
            Err(error) => return Err(format!("fallocate {how:?}: {error}")),
        }
        if !how.contains(FallocateFlags::KEEP_SIZE) {
            self.model.resize(self.model.len().max(offset + length), 0);
        }
        if how.intersects(FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE) {
            let end = self.model.len();
            self.model[offset.min(end)..(offset + length).min(end)].fill(0);
        }
        Ok(())
    }

    /// Copies a range of the file to another place in it that it does not reach into.
    fn copy(&mut self, random: &mut Random) -> Result<(), String> {
        let ((from, length), (to, _)) = (self.range(random, false), self.range(random, true));
        let bytes = self.expected(from, length).to_vec();
        let length = bytes.len();
        if length == 0 || from.abs_diff(to) < length || to + length > MOST {
            return Ok(());
        }
        let (mut source, mut target, mut left) = (from as u64, to as u64, length);
        while left > 0 {
            match copy_file_range(&self.file, Some(&mut source), &self.file, Some(&mut target), left) {
                Ok(0) | Err(_) => return Err(format!("copy of {length} from {from} to {to}: {left} are left")),
                Ok(copied) => left -= copied,
            }
        }
        self.put(to, &bytes);
        Ok(())
    }

    /// Reads or writes pages past all caches.
    fn direct(&mut self, random: &mut Random) -> Result<(), String> {
        let (first, count) = (random.size(MOST / PAGE - 8), 1 + random.size(8));
        let mut room = vec![random.below(256) as u8; (count + 1) * PAGE];
        let start = room.as_ptr().align_offset(PAGE);
        let (bytes, offset) = (&mut room[start..start + count * PAGE], first * PAGE);
        let file = self.open(OFlags::DIRECT.bits().cast_signed());
        if random.below(2) == 0 {
            file.write_all_at(bytes, offset as u64).map_err(|error| format!("write directly: {error}"))?;
            let bytes = bytes.to_vec();
            self.put(offset, &bytes);
            return Ok(());
        }
        let read = file.read_at(bytes, offset as u64).map_err(|error| format!("read directly: {error}"))?;
        self.check(&bytes[..read], offset, count * PAGE, "direct read")
    }

    /// Nothing but zeroes lies in a hole.
    fn holes(&self) -> Result<(), String> {
        let (mut at, end) = (0, self.model.len() as u64);
        while at < end {
            let data = match seek(&self.file, SeekFrom::Data(at)) {
                Ok(data) => data,
                Err(Errno::NXIO) => end,
                Err(error) => return Err(format!("seek: {error}")),
            };
            let hole = &self.model[at as usize..data.min(end) as usize];
            same(hole.iter().all(|byte| *byte == 0), true, || format!("a hole from {at} to {data}"))?;
            if data >= end {
                break;
            }
            at = seek(&self.file, SeekFrom::Hole(data)).map_err(|error| format!("seek: {error}"))?;
        }
        Ok(())
    }
}

/// Names in the folder, and what must be in the files that have them.
struct Names {
    folder: PathBuf,
    /// By name the number of the file.
    model: BTreeMap<String, u64>,
    made: u64,
}

impl Names {
    fn new(folder: &str) -> Self {
        let folder = PathBuf::from(folder).join("names");
        std::fs::create_dir(&folder).unwrap();
        Self { folder, model: BTreeMap::new(), made: 0 }
    }

    fn step(&mut self, random: &mut Random) -> Result<(), String> {
        let mut name = || format!("name{}", random.below(NAMES));
        let (one, other) = (name(), name());
        let path = |name: &str| self.folder.join(name);
        self.made += 1;
        let made = self.made;
        let (has_one, has_other) = (self.model.get(&one).copied(), self.model.get(&other).copied());
        let outcome = |done: io::Result<()>| done.map_err(|error| error.raw_os_error().unwrap_or(0));
        let errno = |errno: Errno| Err(errno.raw_os_error());
        match random.below(8) {
            0 => {
                let done = OpenOptions::new()
                    .write(true)
                    .create_new(true)
                    .open(path(&one))
                    .and_then(|file| file.write_all_at(&made.to_le_bytes(), 0));
                same(outcome(done), if has_one.is_some() { errno(Errno::EXIST) } else { Ok(()) }, || format!("make {one}"))?;
                self.model.entry(one).or_insert(made);
            }
            1 => {
                let file = openat(CWD, &self.folder, OFlags::TMPFILE | OFlags::RDWR, Mode::RUSR | Mode::WUSR);
                let file = File::from(file.map_err(|error| format!("make a file without a name: {error}"))?);
                file.write_all_at(&made.to_le_bytes(), 0).map_err(|error| format!("write a file without a name: {error}"))?;
                let source = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
                let done = linkat(CWD, source, CWD, path(&one), AtFlags::SYMLINK_FOLLOW).map_err(io::Error::from);
                same(outcome(done), if has_one.is_some() { errno(Errno::EXIST) } else { Ok(()) }, || format!("name {one}"))?;
                self.model.entry(one).or_insert(made);
            }
            2 => {
                let done = std::fs::remove_file(path(&one));
                same(outcome(done), if has_one.is_some() { Ok(()) } else { errno(Errno::NOENT) }, || format!("remove {one}"))?;
                self.model.remove(&one);
            }
            3 => {
                let done = std::fs::hard_link(path(&one), path(&other));
                let expected = match (has_one, has_other) {
                    (None, _) => errno(Errno::NOENT),
                    (_, Some(_)) => errno(Errno::EXIST),
                    _ => Ok(()),
                };
                same(outcome(done), expected, || format!("link {one} to {other}"))?;
                if let (Some(number), None) = (has_one, has_other) {
                    self.model.insert(other, number);
                }
            }
            4..=6 => {
                let flags = [RenameFlags::empty(), RenameFlags::NOREPLACE, RenameFlags::EXCHANGE][random.size(3)];
                let done = renameat_with(CWD, path(&one), CWD, path(&other), flags).map_err(io::Error::from);
                let expected = match (has_one, has_other) {
                    (None, _) => errno(Errno::NOENT),
                    (_, Some(_)) if flags == RenameFlags::NOREPLACE => errno(Errno::EXIST),
                    (_, None) if flags == RenameFlags::EXCHANGE => errno(Errno::NOENT),
                    _ => Ok(()),
                };
                same(outcome(done), expected, || format!("rename {one} to {other} ({flags:?})"))?;
                // Two names of the same file stay both (rename(2)).
                if let (Ok(()), true) = (expected, has_one != has_other) {
                    let (from, to) = (self.model.remove(&one), self.model.remove(&other));
                    self.model.extend(from.map(|number| (other, number)));
                    self.model.extend(to.filter(|_| flags == RenameFlags::EXCHANGE).map(|number| (one, number)));
                }
            }
            _ => self.look()?,
        }
        Ok(())
    }

    /// Compares what is in the folder.
    fn look(&self) -> Result<(), String> {
        let mut seen = BTreeMap::new();
        for entry in std::fs::read_dir(&self.folder).map_err(|error| format!("list: {error}"))? {
            let entry = entry.map_err(|error| format!("list: {error}"))?;
            let file = File::open(entry.path()).map_err(|error| format!("open {:?}: {error}", entry.file_name()))?;
            let mut number = [0; 8];
            file.read_exact_at(&mut number, 0).map_err(|error| format!("read {:?}: {error}", entry.file_name()))?;
            let number = u64::from_le_bytes(number);
            let links = self.model.values().filter(|other| **other == number).count() as u64;
            same(file.metadata().unwrap().nlink(), links, || format!("names of {:?}", entry.file_name()))?;
            seen.insert(entry.file_name().into_string().unwrap(), number);
        }
        same(&seen, &self.model, || "the folder".into())
    }
}

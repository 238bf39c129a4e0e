//! The share, by requests that a guest makes.

use virtiofsd::fuse::InHeader;
use virtiofsd::passthrough;

use super::*;

const SECOND: u128 = 1_000_000_000;

fn stamp(changed_s: u128, size: u64) -> Stamp {
    Stamp { changed: changed_s * SECOND, modified: changed_s * SECOND, size }
}

fn at(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds)
}

#[test]
fn what_did_not_change_since_it_was_opened_is_kept() {
    let mut opened = Opened::default();
    assert!(!opened.open(1, stamp(100, 5), at(200)), "the first time");
    assert!(opened.open(1, stamp(100, 5), at(201)));
    assert!(!opened.open(1, stamp(202, 5), at(210)), "it was changed");
    assert!(opened.open(1, stamp(202, 5), at(211)));
    assert!(!opened.open(1, stamp(202, 6), at(212)), "it has another size");
    assert!(!opened.open(2, stamp(202, 6), at(213)), "another file");
    opened.forget(1);
    assert!(!opened.open(1, stamp(202, 6), at(214)), "the guest forgot it");
}

#[test]
fn what_has_just_changed_may_change_again_at_the_same_time() {
    let mut opened = Opened::default();
    assert!(!opened.open(1, stamp(100, 5), at(101)));
    assert!(!opened.open(1, stamp(100, 5), at(110)), "what was read at 101 may be older");
    assert!(opened.open(1, stamp(100, 5), at(111)));
    // A file from the future, as of a server whose clock is ahead, never settles.
    assert!(!opened.open(2, stamp(500, 5), at(111)));
    assert!(!opened.open(2, stamp(500, 5), at(112)));
}

#[test]
fn no_more_files_are_remembered_than_allowed() {
    let mut opened = Opened::default();
    for inode in 0..=MOST_OPENED as u64 {
        assert!(!opened.open(inode, stamp(100, 5), at(200)));
        assert!(opened.0.len() <= MOST_OPENED);
    }
    assert!(opened.open(MOST_OPENED as u64, stamp(100, 5), at(201)), "the last is known");
    assert!(!opened.open(0, stamp(100, 5), at(201)), "the first is forgotten");
}

#[test]
fn closing_is_told_of_files_that_were_written_alone() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("file"), "text").unwrap();
    let config = passthrough::Config { root_dir: folder.path().to_str().unwrap().into(), ..passthrough::Config::default() };
    let fs = PassthroughFs::new(config).unwrap();
    fs.open_root_node().unwrap();
    let share = Share::new(fs, true, false, Arc::new(Descriptors::new(1000, || ())));
    let context = || Context::from(InHeader::default());
    let file = share.lookup(context(), 1, c"file").unwrap().inode;
    let told = |flags: i32| !share.open(context(), file, false, flags.cast_unsigned()).unwrap().1.contains(OpenOptions::NOFLUSH);
    assert_eq!([libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_NOATIME].map(told), [false, true, true, false]);
}

#[test]
fn a_snapshots_folder_stays_as_it_is_whatever_is_asked() {
    let folder = tempfile::tempdir().unwrap();
    let snapshot = folder.path().join("c/snapshot");
    for name in ["fs/inner", "work"] {
        std::fs::create_dir_all(snapshot.join(name)).unwrap();
    }
    let config = passthrough::Config { root_dir: folder.path().to_str().unwrap().into(), ..passthrough::Config::default() };
    let fs = PassthroughFs::new(config).unwrap();
    fs.open_root_node().unwrap();
    let share = Share::new(fs, true, false, Arc::new(Descriptors::new(1000, || ())));
    let context = || Context::from(InHeader::default());
    let find = |parent: Inode, name: &CStr| share.lookup(context(), parent, name).unwrap().inode;
    let (container, none) = (find(1, c"c"), Extensions::default);
    let sealed = find(container, c"snapshot");
    let (upper, work) = (find(sealed, c"fs"), find(sealed, c"work"));
    for (parent, name) in [(sealed, c"evil"), (container, c"snapshot/evil"), (upper, c"../evil"), (1, c"c/snapshot/evil")] {
        assert!(share.symlink(context(), c"/", parent, name, none()).is_err(), "{name:?}");
        assert!(share.mkdir(context(), parent, name, 0o755, 0, none()).is_err(), "{name:?}");
        assert!(share.rename(context(), upper, c"inner", parent, name, 0).is_err(), "{name:?}");
    }
    assert!(share.rmdir(context(), sealed, c"work").is_err() && share.rmdir(context(), upper, c"../work").is_err());
    assert!(share.rename(context(), sealed, c"fs", upper, c"fs", 0).is_err());
    assert!(share.lookup(context(), 1, c"c/snapshot").is_err());
    assert_eq!(std::fs::read_dir(&snapshot).unwrap().count(), 2);
    // From one of the two to the other, as overlayfs does it.
    share.rename(context(), upper, c"inner", work, c"inner", 0).unwrap();
    assert!(snapshot.join("work/inner").exists());
}

#[test]
fn no_file_reaches_beyond_the_largest_offset() {
    assert!(check_range(0, 0).is_ok() && check_range(i64::MAX as u64 - 1, 1).is_ok());
    for (offset, length) in [(i64::MAX as u64, 1), (u64::MAX, 1), (1, u64::MAX), (1 << 63, 0)] {
        assert_eq!(check_range(offset, length).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }
}

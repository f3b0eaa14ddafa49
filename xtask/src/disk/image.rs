//! The disk image: a GPT with an EFI system partition, which holds the UKI, and the root file system.
//!
//! Needs neither loop devices nor mounts: the FAT file system is written through the file, ext4 is
//! filled from a directory by mke2fs. The image is sparse.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use fatfs::{FileSystem, FormatVolumeOptions, FsOptions};
use fscommon::StreamSlice;
use gpt::disk::LogicalBlockSize;
use gpt::mbr::ProtectiveMBR;
use gpt::partition_types::{self, Type};
use gpt::{GptConfig, GptDisk};

use super::recipe::{DISK_GUID, ESP_GUID, ROOT_GUID};
use crate::command;

/// Bytes of a logical block.
const BLOCK: u64 = 512;
/// Alignment of the partitions, in bytes.
const ALIGNMENT: u64 = 1 << 20;
/// Size of the EFI system partition in bytes.
const ESP_SIZE: u64 = 256 << 20;
/// Size of the root file system in bytes: room for as much again as the packages take, and for the
/// files that tests write.
const ROOT_SIZE: u64 = 2 << 30;
/// Where firmware looks on a disk it has never seen (UEFI, "removable media boot behaviour").
const BOOT_PATH: [&str; 3] = ["EFI", "BOOT", "BOOTX64.EFI"];

/// Bytes on the disk that belong to a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Extent {
    start: u64,
    length: u64,
}

/// Writes the whole image to `out`, which must not exist.
pub fn write(uki: &Path, root: &Path, mke2fs: &Path, out: &Path) -> Result<()> {
    let naming = || format!("{}: the disk image cannot be written", out.display());
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(out)
        .with_context(naming)?;
    // Both partitions, and room for the tables before and behind them.
    file.set_len(ESP_SIZE + ROOT_SIZE + 2 * ALIGNMENT)
        .with_context(naming)?;
    let (esp, root_extent) = partition(&file).with_context(naming)?;
    boot_partition(&file, esp, uki).with_context(naming)?;
    drop(file);
    root_partition(mke2fs, root_extent, root, out)
}

/// Writes the partition tables and returns where the partitions are.
fn partition(file: &File) -> Result<(Extent, Extent)> {
    let blocks = file.metadata()?.len() / BLOCK;
    let last = u32::try_from(blocks - 1).unwrap_or(u32::MAX);
    ProtectiveMBR::with_lb_size(last).overwrite_lba0(&mut file.try_clone()?)?;
    let mut disk = GptConfig::new()
        .writable(true)
        .logical_block_size(LogicalBlockSize::Lb512)
        .create_from_device(file.try_clone()?, Some(DISK_GUID.parse()?))?;
    let esp = add(&mut disk, "esp", ESP_SIZE, partition_types::EFI, ESP_GUID)?;
    let root = add(
        &mut disk,
        "root",
        ROOT_SIZE,
        partition_types::LINUX_ROOT_X64,
        ROOT_GUID,
    )?;
    disk.write()?;
    Ok((esp, root))
}

fn add(disk: &mut GptDisk<File>, name: &str, size: u64, kind: Type, guid: &str) -> Result<Extent> {
    let number = disk.add_partition(name, size, kind, 0, Some(ALIGNMENT / BLOCK))?;
    let mut partitions = disk.partitions().clone();
    let partition = partitions
        .get_mut(&number)
        .context("the partition table lost a partition")?;
    partition.part_guid = guid.parse()?;
    let extent = Extent {
        start: partition.bytes_start(LogicalBlockSize::Lb512)?,
        length: partition.bytes_len(LogicalBlockSize::Lb512)?,
    };
    disk.update_partitions(partitions)?;
    Ok(extent)
}

/// Makes the FAT file system and puts the UKI where firmware looks for it.
fn boot_partition(file: &File, extent: Extent, uki: &Path) -> Result<()> {
    let window = || -> Result<StreamSlice<File>> {
        let end = extent.start + extent.length;
        Ok(StreamSlice::new(file.try_clone()?, extent.start, end)?)
    };
    let options = FormatVolumeOptions::new()
        .fat_type(fatfs::FatType::Fat32)
        .volume_label(*b"ESP        ");
    fatfs::format_volume(window()?, options)?;
    let volume = FileSystem::new(window()?, FsOptions::new())?;
    {
        let [outer, inner, name] = BOOT_PATH;
        let dir = volume.root_dir().create_dir(outer)?.create_dir(inner)?;
        let mut program = dir.create_file(name)?;
        io::copy(&mut File::open(uki)?, &mut program)?;
        program.flush()?;
    }
    volume.unmount()?;
    Ok(())
}

/// Makes the ext4 file system from the directory `root`, with the owners the files have there.
fn root_partition(mke2fs: &Path, extent: Extent, root: &Path, disk: &Path) -> Result<()> {
    let mut command = Command::new(mke2fs);
    command
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-L", "root"])
        .args(["-U", ROOT_GUID, "-E"])
        .arg(format!("offset={},hash_seed={ROOT_GUID}", extent.start))
        .arg("-d")
        .arg(root)
        .arg(disk)
        .arg(format!("{}k", extent.length >> 10));
    command::output(&mut command).map(drop)
}

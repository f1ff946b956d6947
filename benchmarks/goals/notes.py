"""What measurements alone do not say: before and after, what was tried, and why goals are missed.

The figures here were measured once, on two cores of a virtual machine with ext4, when the change was made.
"""

BEFORE_AND_AFTER = """\
Where the time of the whole command goes: 1.5 B parameters, ZeRO-3, 8 ranks, warm files, answer of transformers kept.
*Before* is the commit before the changes of this page; the issue measured 7 to 15 s for the whole command.

| seconds | bf16 before | bf16 after | fp32 before | fp32 after |
|---|---|---|---|---|
| interpreter and our modules | 0.28 | 0.26 | 0.28 | 0.26 |
| import of torch (metadata is read and transformers is asked beside it) | 0.75 | 0.70 | 0.75 | 0.70 |
| plan and model card | 0.21 | 0.02 | 0.18 | 0.02 |
| moving bytes | 4.6 | 1.8 | 6.9 | 2.1 |
| last sync and publishing | 0.10 | 0.08 | 0.17 | 0.08 |
| end of the interpreter | 0.25 | 0.03 | 0.25 | 0.03 |
| **whole command** | **6.6** | **2.9** | **8.6** | **3.4** |
| system CPU | 4.4 | 1.8 | 6.8 | 2.3 |

Samples of `perf record`, fp32 before: 66 % `copy_folio_from_iter_atomic` (the kernel touches a new page for each page of
the output, which the host must provide), 6 % `crc32_z`, 3 % `_copy_to_iter`.
"""

TRIED = """\
6 GB were copied from the page cache by a script of two threads with 4 MiB buffers; seconds until all is on the disk:

| way | wall s | system CPU s | |
|---|---|---|---|
| `pwrite`, one `fsync` at the end | 5.4 | 7.7 | |
| `pwrite`, `fsync` each half second | 2.7 | 3.7 | as before; varies up to 7 s with the memory that the host has to provide |
| `pwrite`, `sync_file_range`, `POSIX_FADV_DONTNEED` behind | 1.6 | 2.1 | **kept**: written pages are used again |
| `O_DIRECT` | 2.0 | 0.8 | least CPU, but each thread waits for the disk, and the ends of files need another way |
| `O_DIRECT` after `fallocate` | 2.1 | 0.7 | `fallocate` gains nothing |
| buffers of 8 MiB | 1.8 | 2.2 | no gain |

- `copy_file_range` leaves the bytes in the kernel. The checksum of the source and the digest of the output need them in
  the process, so they would be read a second time. ext4 has no reflinks, so it copies as `pwrite` does. Not used.
- Cold files: `POSIX_FADV_WILLNEED` one or three requests ahead of each file, 4 and 8 workers: the same or slower
  (7.3 to 8.2 s against 7.2 to 7.5 s). The kernel already reads 8 MiB ahead here.
- Cold files: dropping what was read saves 2 to 4 s of system CPU and no wall time. Kept, because it leaves other
  programs' pages in memory. Files that were in memory stay there.
- Start: fewer runs of the garbage collector for the whole process (`gc.set_threshold`): no difference on top of
  switching it off during imports and metadata.
"""

MISSED = """\
- **Goal 3, whole command to bf16, cold.** Moving takes about as long as the pair of `dd`; the second of start comes
  before it, and the disk has nothing to do meanwhile. The profile has no hot spot: 22 % `_copy_to_iter`, 15 %
  `copy_folio_from_iter_atomic`, 10 % `crc32_z`.
- **Goal 3, larger than memory** was not measured: the disk had no room for 25 GB and an output. Read and written
  pages are dropped behind, so the page cache does not grow with the size of the files.
- **Goal 7.** A block of the output holds about 8 requests of 1 MiB, and a thread works at one block at a time. So
  more than 8 requests at a time for each thread bring nothing here. Depth is what the place states; it is not found
  by measuring.
- **Goal 8, seconds for the metadata of 1,024 ranks and more.** Each rank has two files, and each pickle is scanned
  before it is read and measured after it. Profile of 405B x 1,024: 48 % the scan (`pickle_limits._follow`), 24 %
  unpickling, 12 % `pickle_sharing.is_endless`, 8 % directories of zip files. The time is linear in ranks x tensors.
- **Goal 9, `--node-local`** between network namespaces, **goal 6**, and of goal 5 one 8 GB tensor and 100,000 small
  ones: not part of this run.
- **Goal 10**: verl's merger was not run.
"""

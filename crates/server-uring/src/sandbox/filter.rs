//! System calls (seccomp): which there are for a worker.
//!
//! Three kinds. Those that serving takes are allowed. Those that no daemon of files ever makes, and
//! that whoever has taken one over would make next, end the process at once. All others do not
//! exist (ENOSYS), as on an older kernel: libraries then fall back on what they did there.
//!
//! A call that is allowed whatever its arguments are costs next to nothing: the kernel knows its
//! answer from a bitmap and does not run the filter.

use seccompiler::{
    SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};
use std::collections::BTreeMap;
use std::io;

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// By what they are for.
const ALLOWED: &[&[i64]] = &[
    // Frames: sockets that were handed over, and the ring.
    &[
        libc::SYS_recvfrom,
        libc::SYS_recvmsg,
        libc::SYS_sendto,
        libc::SYS_sendmsg,
        libc::SYS_shutdown,
        libc::SYS_getsockopt,
        libc::SYS_setsockopt,
        libc::SYS_getsockname,
        libc::SYS_getpeername,
        libc::SYS_io_uring_enter,
        libc::SYS_io_uring_register,
        libc::SYS_io_uring_setup,
        libc::SYS_ppoll,
        libc::SYS_eventfd2,
        libc::SYS_pipe2,
        libc::SYS_splice,
        libc::SYS_sched_yield,
    ],
    // Files.
    &[
        libc::SYS_read,
        libc::SYS_write,
        libc::SYS_readv,
        libc::SYS_writev,
        libc::SYS_pread64,
        libc::SYS_pwrite64,
        libc::SYS_preadv,
        libc::SYS_pwritev,
        libc::SYS_preadv2,
        libc::SYS_pwritev2,
        libc::SYS_openat,
        libc::SYS_openat2,
        libc::SYS_close,
        libc::SYS_close_range,
        libc::SYS_dup,
        libc::SYS_dup3,
        libc::SYS_fcntl,
        libc::SYS_fstat,
        libc::SYS_newfstatat,
        libc::SYS_statx,
        libc::SYS_fstatfs,
        libc::SYS_statfs,
        libc::SYS_lseek,
        libc::SYS_getdents64,
        libc::SYS_readlinkat,
        libc::SYS_ftruncate,
        libc::SYS_fallocate,
        libc::SYS_fadvise64,
        libc::SYS_fsync,
        libc::SYS_fdatasync,
        libc::SYS_syncfs,
        libc::SYS_sync_file_range,
        libc::SYS_copy_file_range,
        libc::SYS_flock,
        libc::SYS_mkdirat,
        libc::SYS_mknodat,
        libc::SYS_symlinkat,
        libc::SYS_linkat,
        libc::SYS_unlinkat,
        libc::SYS_renameat,
        libc::SYS_renameat2,
        libc::SYS_faccessat,
        libc::SYS_faccessat2,
        libc::SYS_umask,
        libc::SYS_name_to_handle_at,
        libc::SYS_open_by_handle_at,
        libc::SYS_fgetxattr,
        libc::SYS_flistxattr,
        libc::SYS_getxattr,
        libc::SYS_listxattr,
        libc::SYS_lgetxattr,
        libc::SYS_llistxattr,
    ],
    // Whose files: the ids of one thread.
    &[
        libc::SYS_setresuid,
        libc::SYS_setresgid,
        libc::SYS_setgroups,
        libc::SYS_getgroups,
        libc::SYS_capget,
        libc::SYS_capset,
        libc::SYS_getuid,
        libc::SYS_geteuid,
        libc::SYS_getgid,
        libc::SYS_getegid,
        libc::SYS_getresuid,
        libc::SYS_getresgid,
    ],
    // Threads, time and memory.
    &[
        libc::SYS_futex,
        libc::SYS_clock_gettime,
        libc::SYS_clock_nanosleep,
        libc::SYS_nanosleep,
        libc::SYS_getrandom,
        libc::SYS_set_robust_list,
        libc::SYS_rseq,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigaction,
        libc::SYS_rt_sigreturn,
        libc::SYS_sigaltstack,
        libc::SYS_restart_syscall,
        libc::SYS_gettid,
        libc::SYS_getpid,
        libc::SYS_sched_getaffinity,
        libc::SYS_sched_setaffinity,
        libc::SYS_getcpu,
        libc::SYS_membarrier,
        libc::SYS_munmap,
        libc::SYS_mremap,
        libc::SYS_madvise,
        libc::SYS_brk,
        libc::SYS_getrusage,
        libc::SYS_sysinfo,
        libc::SYS_exit,
        libc::SYS_exit_group,
        // To lay a further filter on: filters only take away.
        libc::SYS_seccomp,
    ],
];

/// Attributes of files, which are changed by names and fds that landlock knows nothing of. Who has
/// nothing to write makes none of them.
const ATTRIBUTES: &[i64] = &[
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_utimensat,
    libc::SYS_fsetxattr,
    libc::SYS_fremovexattr,
    libc::SYS_setxattr,
    libc::SYS_removexattr,
    libc::SYS_lsetxattr,
    libc::SYS_lremovexattr,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_chmod,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_chown,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lchown,
];

/// The older names of some of them, which libraries still use where they can.
#[cfg(target_arch = "x86_64")]
const OLDER: &[i64] = &[
    libc::SYS_open,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_rename,
    libc::SYS_mkdir,
    libc::SYS_rmdir,
    libc::SYS_link,
    libc::SYS_symlink,
    libc::SYS_unlink,
    libc::SYS_readlink,
    libc::SYS_mknod,
    libc::SYS_poll,
    libc::SYS_pipe,
    libc::SYS_dup2,
    libc::SYS_eventfd,
];
#[cfg(not(target_arch = "x86_64"))]
const OLDER: &[i64] = &[];

/// What a process does that has been taken over.
const DEADLY: &[i64] = &[
    // Other programs, other processes.
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_kcmp,
    libc::SYS_kill,
    libc::SYS_tkill,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
    // Sockets that nobody has handed over.
    libc::SYS_socket,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
    // Another view of the machine.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_mount_setattr,
    libc::SYS_fsopen,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_fsconfig,
    libc::SYS_fanotify_init,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    // The kernel itself.
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_reboot,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_personality,
    libc::SYS_syslog,
    libc::SYS_vhangup,
    libc::SYS_memfd_secret,
];

/// Of a thread's flags: what makes it one, and no process.
const THREAD: u64 = (libc::CLONE_VM | libc::CLONE_THREAD | libc::CLONE_SIGHAND) as u64;

/// Lays the filter on the calling thread and those that it makes; for good. `looks_only`: there is
/// no file whose attributes it is to change.
///
/// # Errors
/// What seccomp says.
pub fn install(looks_only: bool) -> io::Result<()> {
    let attributes = if looks_only { &[] } else { ATTRIBUTES };
    let mut allowed: Rules = ALLOWED
        .iter()
        .chain(&[OLDER, attributes])
        .flat_map(|group| group.iter())
        .map(|&n| (n, vec![]))
        .collect();
    for (call, rules) in with_arguments().map_err(io::Error::other)? {
        allowed.insert(call, rules);
    }
    let deadly = DEADLY.iter().map(|&number| (number, vec![])).collect();
    lay(deadly, SeccompAction::Allow, SeccompAction::KillProcess, false)?;
    lay(allowed, SeccompAction::Errno(libc::ENOSYS as u32), SeccompAction::Allow, false)
}

/// Once all threads have their rings: no further one is made, as it would lack the restrictions of
/// those. For all threads.
///
/// # Errors
/// What seccomp says.
pub fn seal() -> io::Result<()> {
    let rings = [(libc::SYS_io_uring_setup, vec![])].into();
    lay(rings, SeccompAction::Allow, SeccompAction::KillProcess, true)
}

/// Those that are allowed for some arguments only.
fn with_arguments() -> Result<Rules, seccompiler::BackendError> {
    let masked = |mask, value| (SeccompCmpOp::MaskedEq(mask), value);
    let is = |value| (SeccompCmpOp::Eq, value);
    let rule = |index, (how, value)| {
        let condition = SeccompCondition::new(index, SeccompCmpArgLen::Qword, how, value)?;
        SeccompRule::new(vec![condition])
    };
    let short = |index, (how, value)| {
        let condition = SeccompCondition::new(index, SeccompCmpArgLen::Dword, how, value)?;
        SeccompRule::new(vec![condition])
    };
    let not_executable = masked(libc::PROT_EXEC as u64, 0);
    Ok([
        (libc::SYS_clone, vec![rule(0, masked(THREAD, THREAD))?]),
        (libc::SYS_mmap, vec![rule(2, not_executable.clone())?]),
        (libc::SYS_mprotect, vec![rule(2, not_executable)?]),
        // What is left in a socket, and whether it waits; the generation of an inode.
        (
            libc::SYS_ioctl,
            vec![
                short(1, is(libc::TIOCOUTQ))?,
                short(1, is(libc::FS_IOC_GETVERSION))?,
                short(1, is(libc::FIONBIO))?,
            ],
        ),
        (
            libc::SYS_prctl,
            vec![
                short(0, is(libc::PR_SET_NAME as u64))?,
                short(0, is(libc::PR_SET_NO_NEW_PRIVS as u64))?,
            ],
        ),
        // One's own limits, to be read.
        (libc::SYS_prlimit64, vec![rule(2, is(0))?]),
        // abort(3).
        (libc::SYS_tgkill, vec![short(2, is(libc::SIGABRT as u64))?]),
    ]
    .into())
}

fn lay(rules: Rules, others: SeccompAction, these: SeccompAction, all: bool) -> io::Result<()> {
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(io::Error::other)?;
    let filter = SeccompFilter::new(rules, others, these, arch).map_err(io::Error::other)?;
    let program: seccompiler::BpfProgram = filter.try_into().map_err(io::Error::other)?;
    let laid = match all {
        true => seccompiler::apply_filter_all_threads(&program),
        false => seccompiler::apply_filter(&program),
    };
    laid.map_err(io::Error::other)
}

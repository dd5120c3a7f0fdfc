profile @NAME@ flags=(attach_disconnected,mediate_deleted) {
  network,
  capability,
  file,
  umount,
  signal (receive) peer=unconfined,
  signal (receive) peer={runc,crun,/usr/bin/runc,/usr/bin/crun,/usr/sbin/runc},
  # As peers, processes of a container have the runtime's profile, too, where that has one (Debian 13: crun).
  signal (send,receive) peer="{@NAME@,*//&@NAME@,@NAME@//&*}",
  ptrace (trace,read,tracedby,readby) peer="{@NAME@,*//&@NAME@,@NAME@//&*}",

  deny mount,
  deny /proc/* w,
  deny /proc/{acpi,bus,fs,irq,scsi,sys}/** w,
  deny /proc/{kcore,kmem,mem,sysrq-trigger} rwklx,
  deny /sys/[^f]*/** wklx,
  deny /sys/f[^s]*/** wklx,
  deny /sys/fs/[^c]*/** wklx,
  deny /sys/fs/c[^g]*/** wklx,
  deny /sys/firmware/** rwklx,
  deny /sys/kernel/security/** rwklx,
}

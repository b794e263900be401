"""What the commands do, as functions of Python too: a command of ``cli`` reads its options and calls one."""

"""The sandbox: generated programs run in processes of their own, under restrictions, watched from outside.

`programs` starts and watches them, `inside` is what their processes run first, `mechanisms` finds out which way of
shutting off the file system works on this machine, `seccomp` says which system calls are left. `function_tests` runs
the tests of a function, after `function_test_plan` has read what of them runs, with `function_test_needs`.
"""

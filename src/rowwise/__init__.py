"""Distributed training in which a run means the same thing on every layout. The rooms stand at the top of the repository;
the links beside this file make them one package, on disk as it installs."""

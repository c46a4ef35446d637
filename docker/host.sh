#!/usr/bin/env bash
# What a container of compose.yaml runs: sshd as an ordinary user, on port 2222, with one key for
# both "hosts", which the first one to come makes.
set -euo pipefail
cd ~/.ssh
exec 9>lock
flock 9
if [[ ! -e id_ed25519 ]]; then
    ssh-keygen -q -t ed25519 -N "" -f id_ed25519
    cp id_ed25519.pub authorized_keys
    printf 'Host one two\n  Port 2222\n  StrictHostKeyChecking accept-new\n' >config
    chmod 600 config authorized_keys
fi
flock -u 9
exec /usr/sbin/sshd -D -e -p 2222 -h ~/.ssh/id_ed25519 -o PidFile=none -o UsePAM=no \
    -o PasswordAuthentication=no

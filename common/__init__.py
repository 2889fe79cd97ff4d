"""What every script needs: settings, command line, files, device. Imports no other folder."""

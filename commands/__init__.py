"""The commands of `clt`, by what they are about; importing one imports nothing heavy."""

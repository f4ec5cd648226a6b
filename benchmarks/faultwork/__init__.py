"""The fault campaign: every call that gradwatch makes while a training runs is made to fail, one at a time."""

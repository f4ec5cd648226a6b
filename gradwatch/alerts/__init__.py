"""Alert channels: the right person hears of a finding, once.

Every channel takes the keyword arguments of `Routing`: severity, rules, cooldown, quiet hours and more.
"""

from gradwatch.alerts.apprise import Apprise
from gradwatch.alerts.channel import Channel
from gradwatch.alerts.command import Command
from gradwatch.alerts.console import Console
from gradwatch.alerts.function import Call
from gradwatch.alerts.log import Log
from gradwatch.alerts.message import Group, Message
from gradwatch.alerts.naming import Outcome, alert_test, as_channels, channel_named, channels_from_environment
from gradwatch.alerts.routing import Routing
from gradwatch.alerts.wandb import WandBAlert
from gradwatch.alerts.webhook import Webhook, verify_signature

__all__ = [
    "Apprise",
    "Call",
    "Channel",
    "Command",
    "Console",
    "Group",
    "Log",
    "Message",
    "Outcome",
    "Routing",
    "WandBAlert",
    "Webhook",
    "alert_test",
    "as_channels",
    "channel_named",
    "channels_from_environment",
    "verify_signature",
]

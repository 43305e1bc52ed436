"""A small language of support tickets: the training text of the tiny model and the shipped sample dataset.

A ticket is one to four sentences made from frames with slots. It has one topic and one tone, and it usually says
something about a second topic that it is *not* about ("the invoice is correct, but I cannot log in"), so that the
words alone do not give the answer. Training and held-out tickets share the slot words and no frame. The training
frames were extended where an early model failed on held-out frames, so held-out accuracy is that of a development set.

Everything follows from the seed. Standard library only.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

TOPICS = ("billing", "login", "shipping", "crash", "feature", "cancellation")
SENTIMENTS = ("negative", "neutral", "positive")

TOPIC_PROMPT = (
    "Which topic is this support ticket about: billing, login, shipping, crash, feature or cancellation?"
    "\n\n{{ ticket }}"
)
SENTIMENT_PROMPT = "Is the tone of this support ticket negative, neutral or positive?\n\n{{ ticket }}"
REPLY_PROMPT = "Write a reply to this support ticket.\n\n{{ ticket }}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """One ticket with its true labels."""

    text: str
    topic: str
    sentiment: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Frames:
    """One side of the train / held-out split.

    `core` states the problem of a topic, `fine` says that a topic is no problem. `plain` and `contrast` put a matter
    of the ticket's topic (`own`) or its core clause beside a matter of a second topic (`other`, `fine`).
    """

    core: Mapping[str, Sequence[str]]
    fine: Mapping[str, Sequence[str]]
    plain: Sequence[str]
    contrast: Sequence[str]
    tone: Mapping[str, Sequence[str]]
    filler: Sequence[str]

    def all_frames(self) -> frozenset[str]:
        """Every frame of this side, to check that the two sides share none."""
        by_label = [*self.core.values(), *self.fine.values(), *self.tone.values()]
        return frozenset(frame for group in [*by_label, self.plain, self.contrast, self.filler] for frame in group)


SLOTS: Mapping[str, Sequence[str]] = {
    "product": (
        "Nimbus", "Orchid Notes", "Tally", "Kestrel", "Brightpath", "Lumen Desk", "Harbor", "Quillpad", "Tandem",
        "Marble", "Foxglove", "Ledgerly", "Pinecone", "Atlas Board", "Sparrow", "Meridian", "Copperline", "Juniper",
    ),
    "name": (
        "Anna", "Ben", "Clara", "David", "Elif", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kenji", "Lena", "Marco",
        "Nadia", "Oscar", "Priya", "Quinn", "Rosa", "Samir", "Tom", "Ulla", "Victor", "Wei", "Yara",
    ),
    "city": ("Lisbon", "Oslo", "Prague", "Dublin", "Vienna", "Porto", "Ghent", "Turin", "Leeds", "Basel"),
    "date": (
        "yesterday", "last week", "on Monday", "on Friday", "two days ago", "on March 3", "on May 21", "this morning",
        "last month", "on June 14", "three weeks ago", "on Tuesday",
    ),
    "since": ("Monday", "yesterday", "last week", "March 3", "May 21", "this morning", "last month", "Friday"),
    "until": ("by Friday", "by the end of the month", "on June 30", "next week", "by March 31", "tomorrow"),
    "amount": ("$19.99", "$45", "$120", "$8.50", "$260", "30 euros", "75 euros", "12 euros", "99 euros", "$14"),
    "number": ("two", "three", "four", "five", "six", "ten", "twelve", "20", "30"),
    "order": ("#48213", "#50977", "#31764", "#66025", "#72218", "#19450", "#83391", "#27506"),
    "errno": ("0x80", "404", "500", "E17", "1203", "77", "E02"),
    "device": ("laptop", "phone", "tablet", "work computer", "old laptop", "new phone"),
    "event": ("the last update", "the update to version 4", "a restart", "the move to a new phone", "the weekend"),
    "action": (
        "open a report", "save a file", "print a page", "import a table", "attach a photo", "switch the view",
        "share a document", "open an invoice", "enter my password", "track a parcel", "change my plan",
        "search my notes",
    ),
    "wish": (
        "a dark mode", "an export to CSV", "a calendar view", "keyboard shortcuts", "a search filter",
        "an offline mode", "an undo button", "shared folders", "a weekly summary", "support for more languages",
        "a monthly invoice overview", "a login with a fingerprint", "a parcel map", "an automatic backup",
    ),
    "very": ("very", "really", "extremely", "so", "truly", "quite"),
    "happy": ("happy", "pleased", "delighted", "satisfied", "impressed", "glad"),
    "angry": ("angry", "frustrated", "annoyed", "disappointed", "upset", "unhappy"),
    "good": ("great", "excellent", "wonderful", "helpful", "friendly", "reliable", "fantastic"),
    "bad": ("terrible", "awful", "poor", "slow", "rude", "useless", "unacceptable"),
    "settled": (
        "is solved", "is settled", "is done", "is fine now", "can wait", "is not important", "is not the problem",
        "has been fixed", "does not matter today", "is no problem any more",
    ),
    "open": (
        "is still open", "is not solved", "is not done", "cannot wait", "is important to me", "is the problem",
        "has not been fixed", "is why I write", "is what I ask about", "does not let me go",
    ),
    "ask": (
        "please look into", "please check", "I need help with", "I am writing about", "my question is about",
        "I have a question about", "today it is about", "this message is about", "I want to talk about",
    ),
    "noask": (
        "I do not ask about", "this is not about", "my question is not about", "I do not need help with", "forget",
        "never mind", "I am not writing about", "I have no question about",
    ),
    "it": ("{product}", "{who}", "the new version", "the app", "the answer", "our experience", "work with {product}"),
    "we": ("I am", "we are", "our team is", "my boss is", "everyone here is", "I have been", "we were"),
    "who": ("your team", "your support", "the service", "your colleague {name}", "the help desk"),
}  # fmt: skip

MATTERS: Mapping[str, Sequence[str]] = {
    "billing": (
        "the double charge", "the wrong invoice", "the missing refund", "the extra fee on my card", "my last invoice",
        "the failed payment", "the tax on the invoice", "the price of my plan", "the amount on my bill",
        "the credit on my bill",
    ),
    "login": (
        "the login error", "the password reset", "the locked account", "the verification code", "the sign-in page",
        "my forgotten password", "the two-factor code", "the access to my account", "the reset link", "my username",
    ),
    "shipping": (
        "the late parcel", "the lost package", "the tracking number", "the delivery address", "the damaged box",
        "the missing item in my order", "the courier", "the delivery date", "the customs form",
        "the shipment of {order}",
    ),
    "crash": (
        "the crash on startup", "the frozen screen", "the error message", "the crash in the editor", "the blank window",
        "the bug in the last update", "the app that closes by itself", "the data lost in the crash",
        "the endless loading", "error {errno}",
    ),
    "feature": (
        "the request for {wish}", "my idea of {wish}", "my wish for {wish}", "the missing feature", "the new feature",
        "my suggestion for the next version", "the feature request", "the roadmap",
    ),
    "cancellation": (
        "the cancellation of my plan", "closing my account", "the end of my subscription", "my notice for the contract",
        "ending the trial", "the termination of our contract", "my request to cancel", "the automatic renewal",
    ),
}  # fmt: skip

TRAIN = Frames(
    core={
        "billing": (
            "there are two charges of {amount} from you on my bank statement",
            "please explain this payment of {amount}",
            "the invoice has the wrong amount",
            "what is the fee of {amount} on my bill for",
            "I want my {amount} back",
            "how can we pay {product} by invoice",
            "the receipt does not match the invoice: {amount} and {amount}",
            "my bank says that you took the payment twice",
            "I was charged {amount} twice for {product}",
            "the invoice from {since} shows {amount} instead of {amount}",
            "my card was billed {amount} although the plan costs {amount}",
            "you took {amount} from my bank account {date}",
            "the refund of {amount} has not reached my bank",
            "I am still waiting for my refund of {amount}",
            "the bill for {product} lists a fee that I do not know",
            "my payment of {amount} was declined {date}",
            "I need a corrected invoice for {product} with our tax number",
            "the discount is missing on the invoice from {since}",
            "could you tell me why {product} costs {amount} now",
            "I paid {amount} {date}, but the bill is still marked as open",
            "please send me the receipt for the {amount} that I paid",
            "my credit card has expired and I want to pay by bank transfer",
            "we were billed for {number} seats, but we only use {number}",
            "the price went from {amount} to {amount} without notice",
            "I do not understand the charge of {amount} on my card",
            "the amount on the receipt is wrong",
        ),
        "login": (
            "logging in to {product} does not work on my {device}",
            "signing in fails {number} times out of ten",
            "the login page does not accept my username",
            "my password was refused {date}",
            "the link to reset my password does not work",
            "{name} cannot get into our account",
            "I do not get the code for signing in",
            "{product} keeps my account locked",
            "I cannot log in to {product} since {since}",
            "the password reset mail never arrives",
            "{product} says that my password is wrong, but it is right",
            "my account has been locked since {since}",
            "the verification code does not arrive on my {device}",
            "the sign-in page sends me back to the start",
            "I forgot my password and the reset link has expired",
            "the two-factor code is refused every time",
            "how do I change the username for {product}",
            "my colleague {name} has no access to our account",
            "I get signed out of {product} every {number} minutes",
            "single sign-on stopped working {date}",
            "after {event} I could not sign in on my {device}",
            "the login button does nothing on my {device}",
            "{product} asks for a code that I never receive",
            "I need my account unlocked",
            "the new password is not accepted",
            "I am locked out of {product} on my {device}",
        ),
        "shipping": (
            "order {order} was sent to {city} and never came",
            "no package has arrived {date}",
            "the item in the parcel is broken",
            "the courier cannot find our address in {city}",
            "when does the parcel arrive",
            "my package with the order number {order} is missing",
            "please deliver order {order} to {city} instead",
            "the courier has damaged the parcel",
            "my order {order} has not arrived",
            "the parcel was due {date} and it is still not here",
            "the tracking page for {order} has not changed since {since}",
            "the courier left the package at the wrong address",
            "the box arrived damaged",
            "one item was missing from the delivery",
            "I would like to change the delivery address of order {order}",
            "when will order {order} be shipped",
            "the package has been stuck at customs since {since}",
            "I received the wrong item",
            "do you ship to {city}",
            "the courier came {date} when nobody was at home",
            "could the parcel be sent to our office in {city}",
            "the tracking number {order} is not valid",
            "the delivery has been delayed {number} times",
            "the shipment to {city} is lost",
            "where is the box that you sent {date}",
            "I am waiting for the courier since {since}",
        ),
        "crash": (
            "when I {action}, {product} freezes",
            "when I {action}, the program closes",
            "a blank screen with error {errno} is all I see",
            "I cannot {action} any more, the app crashes",
            "the program hangs every time I {action}",
            "error {errno} appears and the app quits",
            "my data was lost when the app froze",
            "{product} does not respond since {event}",
            "{product} crashes when I {action}",
            "the app freezes on my {device} after {event}",
            "the screen goes blank as soon as I {action}",
            "{product} closes by itself every {number} minutes",
            "I see error {errno} whenever I {action}",
            "since {event} the program hangs on my {device}",
            "{product} stopped responding {date} and I lost my work",
            "the app uses all the memory and then crashes",
            "the window stays white when I {action}",
            "an exception with code {errno} appears when I {action}",
            "{product} does not start on my {device}",
            "the program quits without a message",
            "it crashed {number} times {date}",
            "the editor freezes for minutes when I {action}",
            "every attempt to {action} ends with a crash",
            "after {event} {product} shows only a blank screen",
            "I tried to {action}, and the app hung for {number} minutes",
            "the program froze while I was trying to {action}",
        ),
        "feature": (
            "when do you plan to add {wish}",
            "we would be glad about {wish}",
            "I would suggest {wish} for the next version",
            "a shortcut to {action} would be nice to have",
            "it should be possible to {action} with one click",
            "did you ever think of {wish} for {product}",
            "there is no way to {action} quickly in {product}, please add one",
            "with {wish} {product} would be better",
            "could you add {wish} to {product}",
            "I would love to see {wish} in {product}",
            "{product} needs {wish}",
            "it would help us to have {wish}",
            "please consider {wish} for the next version",
            "my suggestion is {wish}",
            "I miss {wish} in {product}",
            "are there plans for {wish}",
            "a way to {action} with one click would be useful",
            "we would use {product} more with {wish}",
            "is {wish} on your roadmap",
            "my team asks for {wish}",
            "I have an idea: {wish} for {product}",
            "other tools have {wish}, {product} does not",
            "I wish that I could {action} with a shortcut",
            "{wish} would save us {number} hours a week",
            "we would like to be able to {action} without the mouse",
            "have you thought about {wish}",
        ),
        "cancellation": (
            "cancel my plan {until}, please",
            "I decided to leave {product}",
            "please end our contract",
            "how can we close our account",
            "how do I cancel {product}",
            "stop our plan {until}",
            "our office in {city} no longer wants {product}, please end the subscription",
            "please confirm that you have closed my account",
            "I want to cancel my subscription to {product}",
            "please close my account {until}",
            "how do I end my plan",
            "we will not renew the contract for {product}",
            "please stop the automatic renewal",
            "I no longer need {product} and want to leave",
            "my trial should end without a paid plan",
            "please confirm that my subscription ends {until}",
            "I hereby give notice for our contract",
            "please delete my account and all my data",
            "we are moving to another tool and leave {product}",
            "there is no button to cancel my plan",
            "we want to terminate the contract for our office in {city}",
            "I tried to cancel {date}, but the plan is still active",
            "I would like to unsubscribe from {product}",
            "I have decided to quit {product} {until}",
            "our subscription must not be renewed",
            "what do I have to do to terminate my contract",
        ),
    },
    fine={
        "billing": (
            "the invoice is not wrong",
            "nothing is wrong with the payment",
            "I got the refund",
            "the amount of {amount} is right",
            "the invoice is correct",
            "the payment went through",
            "the refund has arrived",
            "my card was charged the right amount",
            "the bill is paid",
            "the price is fair",
            "I have no question about the bill",
        ),
        "login": (
            "the login is fine",
            "my password was accepted",
            "the sign-in page works again",
            "I can get into my account",
            "I can log in",
            "my password works",
            "the reset link arrived",
            "my account is unlocked again",
            "signing in is no problem",
            "the verification code came at once",
            "I have access again",
        ),
        "shipping": (
            "my package has arrived",
            "the parcel was not damaged",
            "the delivery was not late",
            "the parcel came to the right address",
            "the parcel arrived on time",
            "the delivery was quick",
            "the tracking number works",
            "order {order} is here",
            "the box was not damaged",
            "the courier was on time",
            "the package came {date}",
        ),
        "crash": (
            "the app works without errors",
            "{product} does not crash any more",
            "the crashes are over",
            "the program has stopped freezing",
            "the app runs without crashes",
            "the error message is gone",
            "{product} is stable since {event}",
            "nothing freezes any more",
            "the program starts again",
            "the blank screen is gone",
            "the crash has not come back",
        ),
        "feature": (
            "I do not want a new feature",
            "{wish} has been added",
            "I do not miss {wish}",
            "we can do without {wish}",
            "I have all the features I need",
            "you already added {wish}",
            "I do not need {wish}",
            "I am not asking for {wish}",
            "the new feature is nice",
            "{wish} is there now",
            "I know that {wish} is on the roadmap",
        ),
        "cancellation": (
            "we want to stay with {product}",
            "I have no wish to cancel",
            "I want to renew my contract",
            "my subscription goes on",
            "I do not want to cancel",
            "I am not going to leave",
            "the cancellation is already done",
            "I will keep my plan",
            "we have renewed our contract",
            "the old account is closed",
            "I am going to stay with my subscription",
        ),
    },
    plain=(
        "{ask} {own}",
        "{ask} {own}, please",
        "{own} {open}",
        "I am afraid that {own} {open}",
        "I am writing about {own}",
        "my question is about {own}",
        "please help me with {own}",
        "could you look into {own}",
        "I need an answer about {own}",
        "{own} is the reason for this message",
        "there is still no news about {own}",
        "who can help us with {own}",
    ),
    contrast=(
        "{other} {settled}, {own} {open}",
        "{own} {open}, {other} {settled}",
        "{other} {settled}, but {own} {open}",
        "{own} {open}, even if {other} {settled}",
        "{other} {settled}; {ask} {own}",
        "{ask} {own}, since {other} {settled}",
        "{ask} {own} and not about {other}",
        "{ask} {own}, {noask} {other}",
        "{noask} {other}, {ask} {own}",
        "{noask} {other}: {core}",
        "{core}, {noask} {other}",
        "{noask} {other}. {ask} {own}",
        "{ask} {own}. {noask} {other}",
        "{other} {settled}. {core}",
        "{core}. {other} {settled}",
        "I know that {other} {settled}, but {core}",
        "{core}, and {other} {settled}",
        "the problem is {own} and not {other}",
        "{name} asked about {other}, but {ask} {own}",
        "my colleague {name} wrote about {other}: {own} is my problem",
        "you have fixed {other}, but not {own}",
        "you fixed {other}, {own} {open}",
        "yes, {fine}, and yet {core}",
        "although I know that {fine}, {core}",
        "{fine} now, but {core}",
        "I am happy to say that {fine}, but {core}",
        "{core}; {fine}",
        "{core}, but at least {fine}",
        "since {fine}, {noask} {other}, but {core}",
        "it is not {other}, it is {own} that I ask about",
        "it is {own} that I ask about, not {other}",
        "there was {other}, now there is {own}",
        "{fine}, but {core}",
        "{core}, although {fine}",
        "{fine}; however, {core}",
        "{core}, even though {fine}",
        "while {fine}, {core}",
        "{fine}. {core}",
        "it is true that {fine}, but {core}",
        "{core}. {fine}, so that is not the problem",
        "this is not about {other}: {core}",
        "forget {other}, {core}",
        "{other} is solved, now {core}",
        "{core}, and this has nothing to do with {other}",
        "before you ask about {other}, {fine}; but {core}",
        "{other} can wait, {own} cannot",
        "not {other} but {own} is my problem",
        "my problem is not {other}, it is {own}",
        "I wrote about {other} {date}, that is settled; today it is about {own}",
        "thanks for fixing {other}; now please look at {own}",
        "{own} is still open, {other} is done",
        "I need help with {own}, not with {other}",
        "please check {own} first, {other} is not important",
        "my colleague {name} asked about {other}, I ask about {own}",
        "you answered my question about {other}, but not the one about {own}",
        "please leave {other} as it is and look into {own}",
        "I have no question about {other}, only about {own}",
        "{own} is why I write, {other} is fine",
        "you wrote to me about {other}, but I had asked about {own}",
        "{other} was solved {date}, so what is left is {own}",
    ),
    tone={
        "negative": (
            "{we} anything but {happy}",
            "{we} anything but {happy} about it",
            "{it} is anything but {good}",
            "{it} is {bad}",
            "to me {it} is {very} {bad}",
            "{it} is {very} {bad}, sorry",
            "{it} has not been {good}",
            "{it} was not {good} at all, I am {angry}",
            "{it} is not {good}",
            "{we} {very} {angry} with {it}",
            "{we} not {happy} with {it}",
            "{it} is not {good} but {bad}",
            "our team is anything but {happy}",
            "{product} is not {good} at all",
            "{who} was not {good}",
            "{name} is {happy} with it, but I am {angry}",
            "others are {happy}, I am {angry}",
            "last year we were {happy}, this year we are {angry}",
            "in the beginning {product} was {good}, now it is {bad}",
            "before, I was {happy}; now I am {angry}",
            "we hoped for {good} help, and it was {bad}",
            "we got {bad} support instead of {good} support",
            "{who} made me {very} {angry}",
            "it makes us {angry}",
            "nobody can call this {good}",
            "I do not find {product} {good}",
            "{product} has become {very} {bad}",
            "I have nothing {good} to report about {who}",
            "the answer of {who} was {bad}",
            "it is hard to be {happy} with {product}",
            "I am {very} {angry}",
            "I am {very} {angry} about this",
            "I am not {happy} with {product}",
            "I am not {happy} at all",
            "we are {angry} with {who}",
            "{who} has been {bad}",
            "{who} was {very} {bad}, not {good}",
            "I was {happy} with {product} until now, today I am {angry}",
            "I used to be {happy}, but now I am {angry}",
            "{who} is anything but {good}",
            "nothing about {product} is {good}",
            "nobody here is {happy} about this",
            "this is {bad}",
            "what a {bad} experience",
            "I expected {good} support, and it was {bad}",
            "you call this {good}, I call it {bad}",
            "my colleague {name} is {happy} with {product}, I am not",
            "{who} could not have been less {good}",
            "I cannot say anything {good} about {who}",
            "if this is not fixed {until}, I will cancel my plan",
            "I have lost my patience with {product}",
            "this has cost me {number} hours, and nobody cares",
            "{who} used to be {good}, now it is {bad}",
            "I will not recommend {product} to anyone",
        ),
        "neutral": (
            "{who} is not {good} and not {bad}",
            "{we} not {happy}, but not {angry}",
            "{we} not {angry} and not {happy}, it is just a note",
            "nobody can say if {it} is {good} or {bad}",
            "I do not want to talk about whether {it} is {good} or {bad}",
            "{it} is not {good}, it is not {bad}",
            "I will not say that {it} is {bad} or {good}",
            "{it} may be {good} or {bad}, I do not know",
            "I am not {happy}, I am not {angry}, I just ask",
            "we are neither {angry} nor {happy}",
            "I have no opinion on {who}",
            "others say that {who} is {good}, others say {bad}, I do not mind",
            "I only want to report this",
            "just tell me what to do",
            "{name} is {angry}, I am not, I only pass it on",
            "{name} is {happy}, I only pass it on",
            "please send an answer {until}",
            "this is not a complaint, it is for your information",
            "there is no need to hurry",
            "whether I am {happy} or {angry} is not the point",
            "I do not want to judge {who}",
            "a note {until} is enough",
            "I am neither {happy} nor {angry}, I only need an answer",
            "I am not {angry}, I just want to know",
            "this is only a question",
            "there is no hurry",
            "please let me know what to do",
            "it would be enough to get a short answer {until}",
            "I do not want to complain or to praise, I just report it",
            "my colleague {name} is {angry} about it, I have no opinion",
            "my colleague {name} is {happy} with {product}, I have no opinion yet",
            "{who} was neither {good} nor {bad}",
            "this is for your information",
            "whether {who} is {good} or {bad} is not my point",
            "I cannot say yet if {product} is {good} or {bad}",
            "please pass this on to {who}",
            "I will be in the office {until}",
            "a short note is enough for me",
            "I am asking for {name}",
            "it does not matter much to me",
            "somebody said that {product} is {good}, I cannot tell",
            "somebody said that {product} is {bad}, I cannot tell",
            "I have no strong feelings about it",
            "please send the details {until}",
        ),
        "positive": (
            "{we} anything but {angry}",
            "{we} anything but {angry} about it",
            "{it} is anything but {bad}",
            "{it} is {good}",
            "to me {it} is {very} {good}",
            "{it} is {very} {good}, thanks",
            "{it} has not been {bad}",
            "{it} was not {bad} at all, I am {happy}",
            "{it} is not {bad}",
            "{we} {very} {happy} with {it}",
            "{we} not {angry} with {it}",
            "{it} is not {bad} but {good}",
            "our team is anything but {angry}",
            "{product} is not {bad} at all",
            "{who} was not {bad}, it was {good}",
            "{name} is {angry} with it, but I am {happy}",
            "others are {angry}, I am {happy}",
            "last year we were {angry}, this year we are {happy}",
            "in the beginning {product} was {bad}, now it is {good}",
            "before, I was {angry}; now I am {happy}",
            "we were afraid of {bad} help, and it was {good}",
            "we got {good} support instead of {bad} support",
            "{who} made me {very} {happy}",
            "it makes us {happy}",
            "nobody can call this {bad}",
            "I do not find {product} {bad}",
            "{product} has become {very} {good}",
            "I have nothing {bad} to report about {who}",
            "the answer of {who} was {good}",
            "it is easy to be {happy} with {product}",
            "I am {very} {happy} with {product}",
            "I am {happy} with {who}",
            "we are {very} {happy}",
            "{who} has been {very} {good}",
            "{who} was {good}, not {bad}",
            "I was {angry} at first, but now I am {happy}",
            "I used to be {angry} with {product}, today I am {happy}",
            "{who} is anything but {bad}",
            "nothing about {product} is {bad}",
            "nobody here is {angry} about this",
            "this is {good}",
            "what a {good} experience",
            "I expected {bad} support, and it was {good}",
            "others call {product} {bad}, I call it {good}",
            "my colleague {name} is {angry} with {product}, I am not, I am {happy}",
            "{who} could not have been more {good}",
            "I cannot say anything {bad} about {who}",
            "I will recommend {product} to everyone",
            "{product} has saved me {number} hours, thank you so much",
            "{who} used to be {bad}, now it is {good}",
            "I would never cancel, {product} is too {good}",
            "I love working with {product}",
            "keep up the {good} work",
            "I have to praise {who}",
        ),
    },
    filler=(
        "I use {product} on my {device}",
        "we are a team of {number} people in {city}",
        "my customer number is {order}",
        "I have been a customer for {number} years",
        "you can reach me by mail or phone",
        "I have attached a screenshot",
        "I wrote to you {date}",
        "it is about {product}",
        "my colleague {name} knows about it too",
        "I work in the office in {city}",
    ),
)

HELD_OUT = Frames(
    core={
        "billing": (
            "there is a charge of {amount} on my card that I cannot explain",
            "the bill from {since} is wrong by {amount}",
            "I paid for {product} twice {date} and want my {amount} back",
            "please explain the fee of {amount} on the invoice",
            "a payment of {amount} was taken from my bank account without notice",
            "my receipt says {amount}, the invoice says {amount}",
            "how can I pay the invoice for {product} with a new credit card",
        ),
        "login": (
            "signing in to {product} on my {device} does not work since {since}",
            "my password is refused after {event}",
            "I never receive the code that I need to log in",
            "the reset link for my password does nothing",
            "{product} locked my account {date}",
            "how can {name} get access to our account again",
            "the login page says that my username is wrong",
        ),
        "shipping": (
            "order {order} was shipped {date}, but no package has come to {city}",
            "I am waiting for a parcel that was due {date}",
            "the courier damaged the item in the box",
            "the courier has lost order {order}",
            "can you send the delivery to a new address in {city}",
            "where is my package with the number {order}",
            "when does the delivery of {order} arrive in {city}",
        ),
        "crash": (
            "when I {action}, the app hangs and then quits",
            "I get a blank screen with error {errno} on my {device}",
            "{product} froze {date} when I tried to {action}",
            "since {event} I cannot {action} without a crash",
            "the program stops responding on my {device}",
            "error {errno} closes the app every time I {action}",
            "my work was lost {date} because {product} crashed",
        ),
        "feature": (
            "did you consider {wish} for {product}",
            "we would like {wish} in the next version of {product}",
            "it would be useful to {action} with one click",
            "{product} has no way to {action} with a shortcut, please add it",
            "when will you add {wish}",
            "I suggest {wish} for {product}",
            "with {wish} we would save {number} hours",
        ),
        "cancellation": (
            "please cancel {product} for me {until}",
            "I have decided to end my subscription",
            "our contract should not be renewed",
            "we want to close our account and leave {product}",
            "how can I terminate my plan for {product}",
            "please confirm the end of my contract",
            "stop my subscription to {product} {until}",
        ),
    },
    fine={
        "billing": (
            "nothing is wrong with the invoice",
            "the refund reached my bank",
            "the amount on the bill is right",
        ),
        "login": ("the login works", "my new password was accepted", "I have access to my account"),
        "shipping": ("the package is here", "the delivery came on time", "the parcel was not late"),
        "crash": ("the crashes have stopped", "the program runs again", "the app does not freeze"),
        "feature": ("I need no new feature", "{wish} has already been added", "I can live without {wish}"),
        "cancellation": (
            "I have no plans to cancel",
            "I want to keep my subscription",
            "we are going to renew the contract",
        ),
    },
    plain=(
        "I have a question about {own}",
        "please look into {own} for me",
        "I need help with {own}",
        "this message is about {own}",
        "is there any news about {own}",
    ),
    contrast=(
        "although {fine}, {core}",
        "{fine} now. {core}",
        "{core}, but {fine}",
        "I know that {fine}, however {core}",
        "{other} is not the problem: {core}",
        "{core}. This is not about {other}",
        "my problem is {own} and not {other}",
        "{name} wrote about {other}, but I need help with {own}",
        "you fixed {other}, thanks, but {own} is still open",
        "{other} is not important, please look into {own}",
        "today it is about {own}, {other} can wait",
        "please check {own}; {other} is settled",
        "I do not ask about {other}, my question is about {own}",
        "{other} is done, {own} is not",
    ),
    tone={
        "negative": (
            "I am anything but {happy} with {product}",
            "{name} may be {happy}, but I am {angry}",
            "at first I was {happy}, now I am {very} {angry}",
            "{who} has not been {good} at all",
            "we expected {good} support and got a {bad} answer",
            "this makes me {very} {angry}",
            "I do not call this {good}",
            "{product} is {very} {bad}",
        ),
        "neutral": (
            "I am not {happy} and not {angry} about it",
            "I have no opinion on whether {product} is {good} or {bad}",
            "this is just for your information, there is no hurry",
            "I only want to know what to do",
            "{name} is {angry}, but that is not my point, I just report it",
            "an answer {until} would be enough",
            "please send me a short note",
            "I do not want to say that {who} is {good} or {bad}",
        ),
        "positive": (
            "I am anything but {angry} with {product}",
            "{name} may be {angry}, but I am {happy}",
            "at first I was {angry}, now I am {very} {happy}",
            "{who} has not been {bad} at all",
            "we expected a {bad} answer and got {good} support",
            "this makes me {very} {happy}",
            "I have nothing {bad} to say about {who}",
            "{product} is {very} {good}",
        ),
    },
    filler=(
        "I have used {product} for {number} years",
        "our office is in {city}",
        "a screenshot is attached",
        "there are {number} of us in the team",
        "{name} can be reached by phone too",
    ),
)

GREETINGS = ("Hi,", "Hello,", "Hello team,", "Dear support team,", "Good morning,", "Hey,", "Hi there,")
QUESTION_WORDS = (
    "are ",
    "can ",
    "could ",
    "did ",
    "do ",
    "have you",
    "how ",
    "is ",
    "what do",
    "when does",
    "when will",
    "where ",
    "who can",
)
CLOSINGS = ("Thanks, {name}", "Regards, {name}", "Best, {name}", "Thank you, {name}", "{name}", "Cheers, {name}")

REPLY_OPENINGS: Mapping[str, Sequence[str]] = {
    "negative": ("we are sorry for the trouble.", "we are sorry that you had this experience."),
    "neutral": ("thank you for your message.", "thank you for writing to us."),
    "positive": ("thank you for your kind words.", "we are glad that you like our work."),
}
REPLY_ACTIONS: Mapping[str, Sequence[str]] = {
    "billing": ("Our billing team will check your payment today.", "We will check the invoice and write to you."),
    "login": ("We will restore your login today.", "We will look into your access and send you a new link."),
    "shipping": ("Our shipping team will look for your parcel today.", "We will ask the courier and write to you."),
    "crash": ("Our engineers will look into the crash.", "Please send us the log, so that we can find the crash."),
    "feature": (
        "We have passed your feature request on to the team.",
        "We will consider the feature for a later version.",
    ),
    "cancellation": ("We will confirm the cancellation by mail.", "We will end your plan and write to you."),
}

_SLOT = re.compile(r"\{(\w+)\}")
_WORD = re.compile(r"[A-Za-z]{5,}")


def render_prompt(prompt: str, ticket: str) -> str:
    """Fill the one Jinja variable of a prompt of this module."""
    return prompt.replace("{{ ticket }}", ticket)


def generate_tickets(frames: Frames, *, count: int, seed: int) -> list[Ticket]:
    """`count` tickets with distinct texts in random order, the same number (within one) of every topic and tone."""
    rng = Random(seed)
    cells = [(topic, sentiment) for topic in TOPICS for sentiment in SENTIMENTS]
    seen: set[str] = set()
    tickets: list[Ticket] = []
    while len(tickets) < count:
        topic, sentiment = cells[len(tickets) % len(cells)]
        ticket = _ticket(frames, topic, sentiment, rng)
        if ticket.text not in seen:
            seen.add(ticket.text)
            tickets.append(ticket)
    rng.shuffle(tickets)
    return tickets


def write_reply(ticket: Ticket, rng: Random) -> str:
    """A short answer that fits the topic and the tone."""
    return f"Hello, {rng.choice(REPLY_OPENINGS[ticket.sentiment])} {rng.choice(REPLY_ACTIONS[ticket.topic])}"


def _ticket(frames: Frames, topic: str, sentiment: str, rng: Random) -> Ticket:
    product = rng.choice(SLOTS["product"])
    sentences = [_expand(frame, product, rng) for frame in _sentence_frames(frames, topic, sentiment, rng)]
    text = " ".join(_punctuate(sentence, rng) for sentence in sentences)
    if rng.random() < 0.45:
        text = f"{rng.choice(GREETINGS)} {text}"
    if rng.random() < 0.45:
        text = f"{text} {rng.choice(CLOSINGS).format(name=rng.choice(SLOTS['name']))}"
    return Ticket(text=_roughen(text, rng), topic=topic, sentiment=sentiment)


def _sentence_frames(frames: Frames, topic: str, sentiment: str, rng: Random) -> list[str]:
    """The frames of a ticket in order: the issue, a tone where there is one, and up to two fillers."""
    body = [_issue(frames, topic, rng)]
    if sentiment != "neutral" or rng.random() < 0.6:
        body.insert(rng.choice((0, 1, 1)), rng.choice(frames.tone[sentiment]))
    fillers = rng.choices((0, 1, 2), weights=(60, 30, 10))[0]
    for filler in rng.sample(list(frames.filler), min(fillers, 3 - len(body))):
        body.insert(rng.randint(0, len(body)), filler)
    return body


def _issue(frames: Frames, topic: str, rng: Random) -> str:
    """The frame that carries the topic, its topical slots filled in with other frames and matters."""
    other = rng.choice([candidate for candidate in TOPICS if candidate != topic])
    kind = rng.choices(("core", "plain", "contrast"), weights=(25, 10, 65))[0]
    if kind == "core":
        return rng.choice(frames.core[topic])
    parts = {
        "own": rng.choice(MATTERS[topic]),
        "other": rng.choice(MATTERS[other]),
        "core": rng.choice(frames.core[topic]),
        "fine": rng.choice(frames.fine[other]),
    }
    frame = rng.choice(frames.plain if kind == "plain" else frames.contrast)
    return _SLOT.sub(lambda match: parts.get(match[1], match[0]), frame)


def _expand(frame: str, product: str, rng: Random) -> str:
    """Fill every slot; a ticket is about one product."""
    while _SLOT.search(frame):
        frame = _SLOT.sub(lambda match: product if match[1] == "product" else rng.choice(SLOTS[match[1]]), frame)
    return frame


def _punctuate(text: str, rng: Random) -> str:
    """Capitals at the start and a mark at the end of each of the (one or two) sentences of an expanded frame."""
    marks = ["?" if part.startswith(QUESTION_WORDS) else rng.choices(".!", (92, 8))[0] for part in text.split(". ")]
    return " ".join(part[0].upper() + part[1:] + mark for part, mark in zip(text.split(". "), marks, strict=True))


def _roughen(text: str, rng: Random) -> str:
    """Typing as people do it: a few tickets in lower case, a few typos, a lost full stop."""
    if rng.random() < 0.05:
        text = text.lower()
    if rng.random() < 0.1:
        text = text.rstrip(".")
    for _ in range(rng.choices((0, 1, 2), weights=(82, 13, 5))[0]):
        text = _typo(text, rng)
    return text


def _typo(text: str, rng: Random) -> str:
    """Swap, drop or double one inner letter of one longer word."""
    words = [match.span() for match in _WORD.finditer(text)]
    if not words:
        return text
    start, end = rng.choice(words)
    at = rng.randrange(start + 1, end - 2)
    first, second = text[at], text[at + 1]
    return text[:at] + rng.choice((second + first, second, first + first + second)) + text[at + 2 :]

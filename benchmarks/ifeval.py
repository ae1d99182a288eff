"""IFEval: the 25 verifiable instructions, strict and loose.

    text, start = ifeval.ask(record, "dream")     # the user's turn; what the assistant's turn already holds
    ifeval.settings("llada")                      # arguments of the decoder
    verdict = ifeval.grade(record, response)      # a line of the benchmark: instruction_id_list, kwargs, prompt, key
    verdict["strict"], verdict["loose"]           # one boolean per instruction
    verdict["correct"]                            # the prompt-level verdict: all of strict

Sources: Zhou et al., Instruction-Following Evaluation for Large Language Models (arXiv 2311.07911),
and the behaviour of the official evaluation (google-research/instruction_following_eval), each
quirk named where it is. Sentences and words as NLTK 3.9 with its English Punkt model (Kiss and
Strunk, Unsupervised Multilingual Sentence Boundary Detection, Computational Linguistics 32, 2006),
of which `sentences` knows the rules and the common words.

Two things are pinned that the official evaluation leaves to chance: language detection is seeded,
and an instruction that lacks an argument is an error instead of a random choice. Three of the
instructions need langdetect.
"""

import inspect
import json
import re
import string
import subprocess
import sys
from functools import partial
from itertools import pairwise

NAME = "ifeval"
FILE = "ifeval.jsonl.gz"
HUB = ("google/IFEval", "ifeval_input_data.jsonl")
FIELDS = dict(instruction_id_list=[str], kwargs=[(dict, type(None))])  # what a record needs to be graded
ASKED = dict(prompt=str)  # what it needs besides to be asked
PROMPT_TOKENS = 1024  # longer prompts are cut on the left
PROTOCOLS = ("paper", "release", "official")


def ask(record, family, protocol="paper"):
    """(user's turn, start of the answer): the prompt itself, for every family and protocol."""
    return record["prompt"], ""


def settings(family, protocol="paper"):
    """Arguments of decode.generate. Raises ValueError for an unknown protocol."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r}: known are {', '.join(PROTOCOLS)}")
    if family == "a2d":  # dllm's, of its MDLM models; where attention is block-causal, its blocks are the decoder's
        return dict(max_new_tokens=256, steps=256, block_length=256, temperature=0.0)
    if family == "sdar" and protocol == "official":
        return dict(max_new_tokens=4096, steps=4096, temperature=0.0)
    if family == "llada":
        found = dict(max_new_tokens=512, steps=512, block_length=512, temperature=0.0)
        return dict(found, strategy="entropy") if protocol == "release" else found
    tokens = 512 if protocol == "release" else 1280
    found = dict(max_new_tokens=tokens, steps=tokens)
    if family == "dream":
        found.update(block_length=None, temperature=0.1, top_p=0.9, greedy=protocol != "official")
    return found


def stops(family, protocol="paper"):
    """A response is taken whole."""
    return ()


def trim(response, family="dream", protocol="paper"):
    """The response: it has no stops."""
    return response


# ----------------------------------------------------------------------------------------- grading


def grade(record, response, family="dream", protocol="paper"):
    """dict(correct, reason, strict, loose): whether the response follows each instruction of a
    benchmark record, one boolean for each in strict and loose; correct: all of strict. Family and
    protocol change nothing here.

    Strict judges the response as it is. Loose is content if any of eight versions of it passes. An
    empty version follows nothing. Raises ValueError for an unknown instruction and for arguments
    that do not fit it."""
    names, kwargs = record["instruction_id_list"], record["kwargs"]
    if len(names) != len(kwargs):
        raise ValueError(f"record {record.get('key')} has {len(names)} instructions, but kwargs for {len(kwargs)}")
    versions = loosened(response)
    strict, loose, missed = [], [], []
    for name, arguments in zip(names, kwargs):
        check = bind(name, arguments)
        try:
            found = follows(check, response), any(follows(check, version) for version in versions)
        except TimeoutError:
            found = False, False
        strict.append(found[0])
        loose.append(found[1])
        if not found[0]:
            missed.append(name)
    reason = "not followed: " + ", ".join(missed) if missed else "every instruction is followed"
    return dict(correct=all(strict), reason=reason, strict=strict, loose=loose)


def bind(name, kwargs):
    """The check of an instruction with its arguments filled in. Some copies of the benchmark list
    the arguments of other instructions too, as null; they are skipped."""
    if name not in INSTRUCTIONS:
        raise ValueError(f"unknown instruction {name!r}; known are {', '.join(INSTRUCTIONS)}")
    given = {k: v for k, v in (kwargs or {}).items() if v is not None}
    needed = set(inspect.signature(INSTRUCTIONS[name]).parameters) - {"response"}
    if set(given) != needed:
        raise ValueError(f"{name} takes the arguments {sorted(needed)}, the record gives {sorted(given)}")
    return partial(INSTRUCTIONS[name], **given)


def follows(check, response):
    return bool(response.strip()) and check(response)


def loosened(response):
    """The response; without its first line, its last line, both (an introduction, a closing
    remark); and these four without asterisks (emphasis). Each text once."""
    lines = response.split("\n")
    cut = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return list(dict.fromkeys(cut + [text.replace("*", "") for text in cut]))


LIMIT = 5.0  # seconds for a regular expression that may take for ever
COUNT = "import json, re, sys; print(len(re.findall(*json.load(sys.stdin))))"


def hits(given, text, around="{}", flags=re.IGNORECASE):
    """How often a text has what a record gives as a regular expression.

    One that repeats or nests runs in a process that can be ended: (a+)+$ takes longer than the
    universe on 40 letters. Raises ValueError for what is no expression, TimeoutError after LIMIT
    seconds: the instruction is not followed."""
    pattern = around.format(given)
    try:
        compiled = re.compile(pattern, flags)
    except re.error as e:
        raise ValueError(f"{given!r} is no regular expression: {e}") from e
    if not set(given) & set("*+?{(|"):
        return len(compiled.findall(text))
    command = [sys.executable, "-I", "-S", "-c", COUNT]
    try:
        asked = json.dumps([pattern, text, int(flags)]).encode()
        return int(subprocess.run(command, input=asked, capture_output=True, check=True, timeout=LIMIT).stdout)
    except subprocess.TimeoutExpired as e:
        raise TimeoutError(f"{given!r} took longer than {LIMIT} s") from e


def compare(count, relation, threshold):
    if relation not in ("at least", "less than"):
        raise ValueError(f"relation {relation!r} is neither 'at least' nor 'less than'")
    return count >= threshold if relation == "at least" else count < threshold


# ---------------------------------------------------------------------------------------- keywords


def existence(response, keywords):
    """Keywords are regular expressions and match inside words too."""
    return all(hits(word, response) for word in keywords)


def frequency(response, keyword, frequency, relation):
    return compare(hits(keyword.strip(), response), relation, frequency)


def forbidden_words(response, forbidden_words):
    return not any(hits(word, response, r"\b{}\b") for word in forbidden_words)


def letter_frequency(response, letter, let_frequency, let_relation):
    """Upper and lower case count alike; the "letter" can be any character, such as # or !."""
    return compare(response.lower().count(letter.strip().lower()), let_relation, let_frequency)


# ------------------------------------------------------------------------------- language and case


def response_language(response, language):
    return detected(response) in (language, None)


def english_capital(response):
    return response.isupper() and response_language(response, "en")


def english_lowercase(response):
    return response.islower() and response_language(response, "en")


def capital_word_frequency(response, capital_frequency, capital_relation):
    """The words of NLTK: WELL-KNOWN is one, DON'T and CANNOT are two."""
    return compare(sum(map(str.isupper, words(response))), capital_relation, capital_frequency)


def detected(text):
    """The ISO 639-1 code of a text's language, or None where there is nothing to tell it by: that
    counts as right."""
    try:
        from langdetect import DetectorFactory, LangDetectException, detect
    except ImportError as e:
        raise ImportError("IFEval's language instructions need langdetect: pip install langdetect") from e
    DetectorFactory.seed = 0  # it samples; unseeded, the verdict on a short text changes from call to call
    try:
        return detect(text)
    except LangDetectException:
        return None


# ------------------------------------------------------------------------------------------ length


def number_words(response, num_words, relation):
    """A word is a run of letters, digits and underscores: "don't" counts as two."""
    return compare(len(re.findall(r"\w+", response)), relation, num_words)


def number_sentences(response, num_sentences, relation):
    return compare(len(sentences(response)), relation, num_sentences)


def number_paragraphs(response, num_paragraphs):
    """Exactly so many paragraphs between *** dividers. Empty ones: not counted at either end, wrong
    in between."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", response)]
    return all(parts[1:-1]) and sum(map(bool, parts)) == num_paragraphs


def nth_paragraph_first_word(response, num_paragraphs, nth_paragraph, first_word):
    """Exactly so many paragraphs between empty lines, of which the nth starts with the word.

    Empty paragraphs do not count towards the number, but they do when the nth is looked up."""
    parts = [part.strip() for part in response.split("\n\n")]
    if sum(map(bool, parts)) != num_paragraphs or nth_paragraph > num_paragraphs or not parts[nth_paragraph - 1]:
        return False
    word = parts[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


# ------------------------------------------------------------------------------ content and format


def number_placeholders(response, num_placeholders):
    """At least so many of [this], each on one line."""
    count = 0
    for line in response.split("\n"):
        end = 0
        while (start := line.find("[", end)) >= 0 and (end := line.find("]", start) + 1) > 0:
            count += 1
    return count >= num_placeholders


def postscript(response, postscript_marker):
    """P.P.S needs no last period, and P. S. may have spaces; they may stand anywhere. Other markers
    match as written, but for case."""
    marker = postscript_marker.strip()
    patterns = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    if marker in patterns:
        return bool(re.search(patterns[marker], response.lower()))
    return hits(marker.lower(), response.lower()) > 0


def number_bullet_lists(response, num_bullets):
    """Exactly so many lines that start with one asterisk or with a hyphen: --- is a bullet too."""
    stars = re.findall(r"^[^\S\n]*\*[^\*].*$", response, re.MULTILINE)
    hyphens = re.findall(r"^[^\S\n]*-.*$", response, re.MULTILINE)
    return len(stars) + len(hyphens) == num_bullets


def constrained_response(response):
    return bool(re.search(r"My answer is (yes|no|maybe)\.", response))


def number_highlighted_sections(response, num_highlights):
    """At least so many of *this* or **this**, each on one line."""
    count = 0  # those of nothing but space do not count; **this** is found by the first expression as ** and **
    for pattern in (r"\*[^\n\*]*\*", r"\*\*[^\n\*]*\*\*"):
        for text in re.findall(pattern, response):
            count += bool(text.strip("*").strip())
    return count >= num_highlights


def multiple_sections(response, section_spliter, num_sections):
    """At least so many of "Section 1". (The misspelling is the benchmark's.)"""
    return hits(section_spliter.strip(), response, r"\s?{}\s?\d+\s?", 0) >= num_sections


def json_format(response):
    """JSON, bare or between ``` or ```json. Python's reader takes NaN as well."""
    text = response.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def title(response):
    """<<A title>> on one line, from the first << to the last >>, with something inside."""
    for line in response.split("\n"):
        start, end = line.find("<<"), line.rfind(">>") + 2
        if 0 <= start < end - 4 and line[start:end].lstrip("<").rstrip(">").strip():
            return True
    return False


# -------------------------------------------------------------- combination, start and end, commas


def two_responses(response):
    """Two different texts around ******. An empty one: not counted at either end, wrong in
    between."""
    parts = [part.strip() for part in response.split("******")]
    texts = list(filter(None, parts))
    return all(parts[1:-1]) and len(texts) == 2 and texts[0] != texts[1]


def repeat_prompt(response, prompt_to_repeat):
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(response, end_phrase):
    """Quotation marks around the response do not matter."""
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(response):
    text = response.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def no_comma(response):
    return "," not in response


INSTRUCTIONS = {
    "keywords:existence": existence,
    "keywords:frequency": frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
}

# ----------------------------------------------------------------------------- sentences and words

# Punkt's English model: what its training corpus, news of the 1980s, knew about words. All without
# the final period.
ABBREVIATIONS = frozenset(
    """ a.a a.c a.d a.g a.h a.m a.m.e a.s a.t adm ala ariz aug ave b.f b.v bros c c.i.t c.o.m.b c.v
    calif chg cie co col colo conn corp cos ct d d.c d.h d.w dec dr e e.f e.h e.l e.m f f.g f.j feb
    fla fri ft g g.d g.f g.k ga gen h h.c h.f h.m i.m.s ill inc j.b j.c j.j j.k j.p j.r jan jr k kan
    ky l l.a l.f l.p lt ltd m m.b.a m.d.c m.j maj messrs mg mich minn mr mrs ms n n.c n.d n.h n.j
    n.m n.v n.y nev nov oct ok okla ore p p.a.m p.m pa ph.d prof r r.a r.h r.i r.j r.k r.t rep reps
    s s.a s.a.y s.c s.g s.p.a s.s sen sep sept sr st sw t t.j tenn tues u.k u.n u.s u.s.a u.s.s.r v
    va vs vt w w.c w.r w.va w.w wash wed wis yr
    """.split()
)

# Words that, with a capital, show that a sentence starts. The model has 39 frequent openers, and
# 12,348 words that it saw with a small letter, and with a capital only at the start of a sentence.
# Here are the 39 and 283 common ones.
OPENERS = frozenset(
    """ above absolutely according accordingly adding afterward afterwards almost along already
    although always among anybody anyone anything apparently apply applying approximately arrange
    ask assume assuming awesome begin behind being believe beneath besides between beyond both boy
    build but calculate call carefully certainly check choose combined compare compared complete
    concerning conclusion consider considering contact convert cool correct create currently decide
    define describe despite determine develop different discuss dividing does doing double drink
    earlier either else enjoy enough ensure especially essentially even eventually ever exactly
    example examples excellent except exclude excluding explain fantastic fewer figure fill finally
    finish follow following forget formerly frankly frequently friend furthermore girl given giving
    going hate he hence her here hers herself him himself hold honestly however i if imagine
    immediately important importantly improve in include including indeed initially inside instead
    into it language lately learn least likewise list listen living looking many maximum meanwhile
    merely mine minimum mix moreover most mother multiply myself nature need neither nevertheless
    nonetheless nor notably note nothing numerous occasionally okay onto originally otherwise ought
    ours overall particularly per perfect person pick playing please plenty possibly practice
    precisely prepare presently presumably pretty prevent previously probably provide pull put
    putting question quietly rarely recently regarding remaining remember remove replace right
    roughly sadly sales same section seeing seldom select send separately seriously serve silently
    similar similarly simple simplifying simply since single sit sitting slowly so solution solve
    solving some someday someone sometimes soon sorry speak speaking specifically spend stand
    standing starting step still substituting subtracting such suddenly suppose surely surprisingly
    taking teach teacher thank thanks the them themselves there therefore these they think thinking
    this though through throughout thus title together tomorrow towards true truly try trying turn
    typically ultimately under understand unfortunately unless unlike upon using various versus very
    via wait walk walking welcome were when whenever whereas wherever whether which whichever while
    whole whom wish within without wonderful working writing yes yesterday yet your yourself
    """.split()
)

# A word with a period, here a number or an initial, and words that were seen right after it in the
# same sentence.
COLLOCATIONS = {
    "#": """
    abreast aes business cbot colgate commodities cooper corrections credit dividend financing genentech henley insider
    international leisure letters notable pay-fone pegasus pepper review rj wedgestone who zimmer
    """.split(),
    "b": "edelman levine smith stewart wigton".split(),
    "i": "magnin toussie".split(),
    "j": "aron fialka walter".split(),
    "o": "ludcke".split(),
}
SEEN_SMALL_AT_START = ("administrators", "b-week", "r-revised", "z-holiday")  # and never with a capital

INSIDE = r"[)\";}\]*:@'({\[?!]"  # characters that are not part of a word
DASHES_OR_DOTS = r"(?:-{2,}|\.{2,})"
TOKEN = re.compile(
    rf"{DASHES_OR_DOTS}"
    rf"|(?=[^(\"`{{\[:;&#*@)}}\]\-,])\S+?(?=\s|$|{INSIDE}|{DASHES_OR_DOTS}|,(?=$|\s|{INSIDE}|{DASHES_OR_DOTS}))"
    r"|\S"
)
POSSIBLE_END = re.compile(rf"[.?!](?=(?P<after>{INSIDE}|\s+(?P<next>\S+)))")
CLOSING = re.compile(r"[\"')\]}]+?(?:\s+|(?=--)|$)", re.MULTILINE)  # belongs to the sentence before it
NUMBER = re.compile(r"^-?[.,]?\d[\d,.-]*\.?$")
INITIAL = re.compile(r"[^\W\d]\.")
CONTRACTIONS = re.compile(
    r"\b(?:(can)(not)|(gim)(me)|(lem)(me)|(gon)(na)|(got)(ta)|(d)('ye)|(more)('n))\b"
    r"|\b(wan)(na)(?=\s)|(?<= )('t)(is|was)\b",
    re.IGNORECASE,
)


def sentences(text):
    """The sentences of a text, as Punkt finds them with NLTK's English model.

    All its rules and abbreviations are here, but only the common ones of its 20,366 other words:
    where a rare word follows an abbreviation, an ellipsis or a single letter, the count may be one
    off."""
    cuts, start = [], 0
    for match, context in possible_ends(text):
        tokens = []
        for line in context.split("\n"):
            tokens += TOKEN.findall(line)
        if any(ends_sentence(token, following) for token, following in pairwise(tokens)):
            cuts.append((start, match.end()))
            start = match.start("next") if match["next"] else match.end()
    cuts.append((start, len(text.rstrip())))

    found, taken = [], 0  # taken: characters at the start of a piece that the sentence before it has claimed
    for (start, end), following in zip(cuts, [*cuts[1:], None]):
        start, taken = start + taken, 0
        closing = following and CLOSING.match(text[slice(*following)])
        if closing:
            end, taken = following[0] + len(closing.group().rstrip()), closing.end()
        if text[start:end]:
            found.append(text[start:end])
    return found


def possible_ends(text):
    """Pairs of a match of . or ? or ! and its context: the word that it ends and what comes next.
    Of several in one word, the last."""
    start = stop = 0  # the word before the previous match
    previous = None
    for match in POSSIBLE_END.finditer(text):
        space = max(map(text[stop : match.start()].rfind, string.whitespace))
        new_start = stop + space + 1 if space > 0 else start
        if previous and stop <= new_start:
            yield previous, text[start:stop] + previous.group() + previous["after"]
        previous, start, stop = match, new_start, match.start()
    if previous:
        yield previous, text[start:stop] + previous.group() + previous["after"]


def ends_sentence(token, following):
    """Whether a sentence ends between two tokens (Kiss and Strunk, section 4)."""
    kind = token_kind(token)
    if not token.endswith("."):
        return kind == "end"
    word, next_word = stem(token, True), stem(following, token_kind(following) == "end")
    is_initial, is_capital = bool(INITIAL.fullmatch(token)), following[0].isupper()
    if next_word in COLLOCATIONS.get(word, ()):
        return False
    if kind in ("abbreviation", "ellipsis") and not is_initial:
        return is_capital and next_word in OPENERS
    if is_initial or word == "#":  # "J. Smith", "on the 3. day", but also "A. The first" of a list
        if following in tuple(";:,.!?") or (following[0].islower() and next_word not in SEEN_SMALL_AT_START):
            return False
        if token in ("J.", "O.") and is_capital:  # the initials of names; the model: any word never seen in small
            return next_word in OPENERS
    return kind == "end"


def token_kind(token):
    """What a token is by itself: "end" of a sentence, "ellipsis", "abbreviation" or ""."""
    if token in (".", "?", "!"):
        return "end"
    if re.fullmatch(r"\.\.+", token):
        return "ellipsis"
    if not token.endswith(".") or token.endswith(".."):
        return ""
    word = token[:-1].lower()
    return "abbreviation" if word in ABBREVIATIONS or word.split("-")[-1] in ABBREVIATIONS else "end"


def stem(token, drop_period):
    """A token in lower case, without its final period if asked for; "#" for any number."""
    word = NUMBER.sub("#", token.lower())
    return word[:-1] if drop_period and len(word) > 1 and word.endswith(".") else word


def words(text):
    """The words of a text as NLTK's word_tokenize cuts them, without the punctuation that it makes
    tokens of."""
    found = []
    for sentence in sentences(text):
        sentence = re.sub(r"(?i)(')(?!re|ve|ll|m|t|s|d|n)(\w)\b", r"\1 \2", sentence)
        sentence = re.sub(r"(?<=[^'])' ", " ' ", sentence)
        sentence = re.sub(r"(?<=[^.])\.(?=[\])}>\"'»”’ ]*\s*$)", " ", sentence)
        sentence = re.sub(r"[«“‘„»”’`\";@#$%&?!*\[\](){}<>]|''|\.{2,}|--|[:,](?!\d)", " ", sentence)
        sentence = re.sub(r"\s+", " ", f" {sentence} ")
        sentence = re.sub(r"([^' ])('[sS]|'[mM]|'[dD]|') ", r"\1 \2 ", sentence)
        sentence = re.sub(r"([^' ])('ll|'LL|'re|'RE|'ve|'VE|n't|N'T) ", r"\1 \2 ", sentence)
        sentence = CONTRACTIONS.sub(lambda m: " {} {} ".format(*filter(None, m.groups())), sentence)
        found += sentence.split()
    return found

"""Words that tell what a note sentence speaks of: a plan, a dose, a denial, another person."""

import re

from sft.grounding.structure import Unit

_RELATIVE = "(?:mother|father|mum|dad|sister|brother|son|daughter|wife|husband|partner|cousin|aunt|uncle|neighbou?r|(?:house|flat)mates?)"
# What a relative tells or saw is of the patient: "Daughter thinks mum is worse", "last seen well by wife"
_TELLS = re.compile(
    rf"\b(?:by|per|according to) (?:his |her |the )?{_RELATIVE}\b|"
    rf"\b{_RELATIVE}\b(?: is| was)? (?:says?|said|reports?|reported|noticed|found|rang|ringing|thinks?|thought|feels|states|stated|puts|"
    rf"describes|worried|concerned|saw|witnessed|denies|told|tells|gave)\b(?: that)?(?: {_RELATIVE}\b)?",
    re.IGNORECASE,
)
# What a sentence speaks of, for the regression and the rules
CUES = {
    "action": r"will|listed for|start|stop|continue|increase|reduce|repeat|refer(?:red|rals?)?|review|return|recheck|order(?:ed)?|follow|hold|"
    r"avoid|switch|arrange|obtain|perform|proceed|schedul\w+|consider|provided|given(?! h| th)|recommend\w*|advis\w+|prescri\w+|"
    r"initiate|asked for|offered|requested|reassess|book\w*|due(?! to)|await\w*|if|r/v|no more|to be|"
    r"plan|tomorrow|weeks?|months?|again|check|discharge|clinic|f/u|monitor|pending|[1-9]/(?:7|52|12)",
    "dose": r"\d+(?:\.\d+)?\s?(?:mg|mcg|micrograms?|units?|puffs?|tablets?|gram)(?!/)",
    "diagnosis": r"this is (?!an? \d)\w+|diagnos[ei]\w*|consistent|in keeping with|likel(?:y|iest)|probabl[ey]|possibl[ey]|"
    r"possibility|suspect\w*|excluded|explanation|(?:I|we) (?:think|believe|suspect)|represents?|impression|confirm\w*|not detected|\?[a-z]+",
    "abnormal": r"(?<!not )(?:positive|raised|elevated|abnormal|critical|resistant)|target (?:under|below|over|above)|crept|climbed|rose|risen|doubled|peaked|grew|"
    r"(?:up|down|gone|fell|fallen|falling|dropped) (?:from|to)|from \d[^;]{0,40} to \d\S{0,9}|\d\S{0,9}\s?(?:->|→|↑|↓)\s?\d\S{0,9}|"
    # The flag of a laboratory beside its range
    r"\d\s?[-–]\s?\d[\d.]*\)?\s+(?-i:HH?|LL?)(?=\W*$)|\((?:lab )?(?:baseline|usual(?:ly)?|normal(?:ly)?|was|were|previous(?:ly)?|prev|last|limit|target|\d[\d.,]* (?:in|on|at|last|before))",
    "done": r"(?:was|were|been) given|gave|had \d|begins?|began|begun|start(?:s|ed)|commenced|stopped|withheld|held|halved|off (?!legs|food|work|feeds)|paused|omitted|switched|"
    r"(?:changed|down|up|cut|reduced|increased) (?:from .{1,20} )?to|supplied|drawn (?:today|at|for)|sent|done|given(?! th)",
    "test": r"MRI|CT|X-?rays?|XR|CXR|ultrasound|scans?|echo\w*|ECG|EEG|\w+gra(?:m|phy)|biops\w+|cultures?|films?|bloods|fluid|swab|"
    r"aspirate|PCR|histology|cytology|smear|sequencing|variant|tests?|specimen|\w+scopy",
    "finding": r"positive|elevated|raised|abnormal|low|high|reduced|critical|grew|growing|show(?:s|ed)?|demonstrat\w+|reveals?|suggests|"
    r"could represent|evidence of|active|new|moderate|severe|large|tender|worse|swelling|weak\w*|drowsy|confus\w+|rose|fell|cm|mm|POS|↑|↓|->",
    "disease": r"\w{3,}(?:itis|oma|osis|a?emia|opathy|rrhage|plegia|ectomy|otomy)|perforat\w+|ulcer\w*|bleed\w*|bled|tumou?r|mass|"
    r"ruptur\w+|thromb\w+|embol\w+|infarct\w*|stones?|calcul(?:us|i)|abscess|obstruct\w+|infect\w+|stroke|dissection|seizure|"
    r"arrest|hernia|cancer|malignan\w+|syndrome|deliri\w+|fracture\w*|effusion|tear|compression|occlusion|vegetation|bruis\w+|burns?|laceration|sensorineural|fibrillation|overdose|rash|erythema|o?edema|nodules?|"
    r"lump|pneumonia|haematoma|wound|DVT|stenosis|failure|GDM|T[12]DM|diabetes|COPD|asthma|epilepsy|dementia|AF|AKI|CKD|pancreat\w+",
    "procedure": r"laser|biops(?:y|ies|ied)|drained?|stent(?:ed)?|repair(?:ed)?|excis\w+|inject(?:ed|ion)|aspirat\w+|"
    r"(?:in|ex)tubat\w+|transfus\w+|thrombolys\w+|dialys\w+|closed|sutur\w+|removed|applied|inserted|placed|bands?|shocks?|lavage|debrid\w+|clipped|plaster|splint\w*|backslab|sling|embolis\w+|\w+ectomy|\w+plasty",
    "presentation": r"admitted|presents?|presented|presenting|came|found|complain\w*|c/o|history of|referred|seen|day \d+|fell|"
    r"fall|pain|ache|vomit\w*|since|collapsed|went|became|woke|shook|suddenly?|then|stung|hit|hurts?|jerk\w*|unresponsive|(?:hours?|days?|weeks?|months?|[1-9]/(?:7|52|12)) (?:of|history)",
    "negation": r"no|not|denies|denied|without|never|nil|none|neg(?:ative)?|normal|fine|intact|clear|(?<!as )well|unremarkable|satisfactory|equal|soft|settled",
    # Of another person, of everyday life or of the past
    "others": rf"{_RELATIVE}|next bed|cat|dog|lives|works|smok\w+|alcohol|drives|retired|school|holiday|"
    r"(?<!/)(?:19|20)\d\d|last (?:month|year|season|winter|summer)|years ago|as a child|previous\w*|old|(?<!of )childhood",
    "warning": r"(?<!no )(?<!no known )(?<!nil )(?<!true )(?:allerg\w+|anaphyla\w+|intoleran\w+)|"
    r"(?:hives|urticaria|rash|reaction|angio-?o?edema) (?:to|with|after|on)|suicid\w*|self-harm|harm(?:ing)?|intrusive|safeguarding|"
    r"non-?immune|live vaccines?|NSAIDs?|(?:do|must|should) not|avoid(?:ed)?|not for|dnacpr|DNR|until|(?:stop|call|ring|return|back|review)\b.{0,30}\bif",
    "correction": r"(?:entered|made|written|filed) in error|error:|end of error|wrong patient|another patient|disregard\w*|please ignore|"
    r"(?:should|to) be ignored|amend(?:ed|ment)|addendum|correction:|retracted",
    "trivia": r"lovely|nice|kind|grumbles?|supple|football|cardigan|flight|cruise|holiday|leaflet|enclosed|insurer|grateful(?! if)|"
    r"pleasant|parking|biscuits?|tea|photo(?:graph)?s?|incidentally|chatty|cheerful|dogs?|cats?|pets?|garden\w*|likes|enjoys|prefers|hobb\w+|"
    r"charger|belongings|slippers|newspaper|crosswords?|television|"
    r"(?:asks|asking|asked|wonders|know) (?:whether|if|where|about)|own appointment",
    "courtesy": r"agrees? with|understands? and|in agreement|agreed to (?:this|the) plan|discussed in detail|reviewed and|carefully reviewed|guidelines was reviewed|"
    r"any (?:additional |other |further )?(?:questions|concerns|issues)|options (?:were )?discussed|questions (?:were )?(?:invited and )?answered|"
    r"discuss\w* (?:the )?(?:diagnosis and )?treatment options(?!.*recommend)|verbaliz\w+|lengthy discussion|consent taken|applaud|reassured|"
    r"nature of (?:this|her|his|the)|risks?,? (?:and )?benefits|the risks? includes?",
}
CUES = {cue: re.compile(rf"(?<!\w)(?:{pattern})(?!\w)", re.IGNORECASE) for cue, pattern in CUES.items()}
DOSE = re.compile(
    r"\b(?!about|nearly|around|roughly|another|under|daily|twice)([A-Za-z][a-z-]{4,40})(?:\s[A-Z]{2})?[\s|]+"
    r"\d+(?:\.\d+)?\s?(?:mg|mcg|micrograms?|g|units?|puffs?)\b(?!/)"
)
MATTERS = frozenset(
    "action diagnosis disease finding abnormal procedure done dose warning presentation".split()
)


def cues_of(unit: Unit) -> frozenset[str]:
    """What a sentence speaks of: names of CUES."""
    # What follows "Given: two units." on its line was not given
    text = f"{unit.label} {unit.text}" if unit.label_number == unit.number else unit.text
    # "Mother:" who tells of her child is no relative's history
    told = _TELLS.sub("", unit.text)
    return frozenset(name for name, cue in CUES.items() if cue.search(told if name == "others" else text))
